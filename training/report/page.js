"use strict";

const tip = document.getElementById("tip");

function show(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const above = y - box.height - 14;
  tip.style.left = `${Math.max(8, Math.min(x - box.width / 2, innerWidth - box.width - 8))}px`;
  tip.style.top = `${above < 8 ? y + 18 : above}px`;
}

function hide() {
  tip.hidden = true;
}

document.addEventListener("scroll", hide, { capture: true, passive: true });

// The values of an epoch.
const points = document.getElementById("points");
document.querySelectorAll(".plot").forEach((plot, number) => {
  const chart = JSON.parse(points.textContent)[number];
  const guide = plot.querySelector(".guide");
  const dots = [...plot.querySelectorAll(".dot")];
  let at = chart.x.length - 1;

  function point(index) {
    at = Math.max(0, Math.min(index, chart.x.length - 1));
    const told = [chart.epochs[at]];
    guide.hidden = false;
    guide.style.left = `${chart.x[at]}%`;
    chart.lines.forEach((line, i) => {
      dots[i].hidden = line.y[at] === null;
      if (line.y[at] === null) return;
      dots[i].style.left = `${chart.x[at]}%`;
      dots[i].style.top = `${line.y[at]}%`;
      told.push(`${line.name} ${line.values[at]}`);
    });
    const box = plot.getBoundingClientRect();
    show(told.join("\n"), box.left + (box.width * chart.x[at]) / 100, box.top + 30);
  }

  function leave() {
    hide();
    for (const part of [guide, ...dots]) part.hidden = true;
  }

  function follow(event) {
    const box = plot.getBoundingClientRect();
    const x = (100 * (event.clientX - box.left)) / box.width;
    let nearest = 0;
    chart.x.forEach((place, i) => {
      if (Math.abs(place - x) < Math.abs(chart.x[nearest] - x)) nearest = i;
    });
    point(nearest);
  }

  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: chart.x.length - 1 };
    if (event.key === "Escape") leave();
    if (!(event.key in steps)) return;
    event.preventDefault();
    point(guide.hidden ? at : steps[event.key]);
  });
});

// What a cell of the confusion matrix says.
document.querySelectorAll(".matrix").forEach((table) => {
  const names = [...table.tHead.rows[0].cells].slice(1).map((cell) => cell.textContent);
  function tell(event) {
    const cell = event.target.closest("td");
    if (!cell) return hide();
    const row = cell.parentElement;
    const label = row.cells[0].textContent;
    const count = `${cell.textContent || 0} of ${row.dataset.of}`;
    const box = cell.getBoundingClientRect();
    show(`true ${label}, predicted ${names[cell.cellIndex - 1]}: ${count}`, box.left + box.width / 2, box.top);
  }
  table.addEventListener("pointerover", tell);
  table.addEventListener("pointerdown", tell);
  table.addEventListener("pointerleave", hide);
});

// A heading sorts its table; what has no value stays last.
document.querySelectorAll(".sortable").forEach((table) => {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    const numbers = !heading.classList.contains("text");
    button.addEventListener("click", () => {
      // Names from A, numbers from the least.
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const key = (row) => (numbers ? row.cells[column].dataset.value : row.cells[column].textContent);
      const rows = [...body.rows].sort((a, b) => {
        const [one, two] = [key(a), key(b)];
        if (one === "" || two === "") return (one === "") - (two === "");
        const order = numbers ? one - two : one.localeCompare(two, "en", { numeric: true });
        return ascending ? order : -order;
      });
      body.append(...rows);
    });
  });
});
