import base64
import dataclasses
import hashlib
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.report.browser import Browser
from training.report import curves, page, summary
from training.report.mistakes import Mistake

VOID = {"meta", "link", "img", "br", "path"}
# What a browser would run or draw if it stood in the page as it is.
MARKUP = "<img src=x onerror=alert(1)>"
BREAKS = "</script></style><b>bold</b>&amp;{{ 7 * 7 }}"


class Page(HTMLParser):
    """The elements of a page, each as (name, attributes, text inside), in their order; tags must match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def all(self, tag, **attributes):
        """(attributes, text) of the elements of a name that have these attributes."""
        return [
            (found, "".join(text).strip())
            for name, found, text in self.elements
            if name == tag and all(found.get(key) == value for key, value in attributes.items())
        ]


def history(epochs, **more):
    falling = [1 / (i + 1) for i in range(epochs)]
    rising = [1 - value / 2 for value in falling]
    return {"loss": falling, "val_loss": falling, "accuracy": rising, "val_accuracy": rising, **more}


def report(classes=3, wrong=3, side=64, **changes):
    rng = np.random.default_rng(0)
    names = ["cat", "dog", "fox", *(f"class {i}" for i in range(3, classes))][:classes]
    matrix = 20 * np.eye(classes, dtype=int)
    matrix[0, 1], matrix[1, 0] = 3, 5
    shown = [
        Mistake(
            f"/home/photos/test/dog/{i}.jpg",
            rng.integers(256, size=(side, side, 3)).astype("uint8"),
            "dog",
            0.0625,
            "cat",
            0.875,
            0,
            rng.uniform(size=(side, side)).astype("float32"),
        )
        for i in range(wrong)
    ]
    given = {
        "title": "transfer on torch",
        "subtitle": "MobileNetV2 on photos.",
        "results": [("test accuracy", "90.00% of 68 images"), ("epochs", "5")],
        "matrix": matrix,
        "class_names": names,
        "mistakes": shown,
        "unreadable": {"photos/b.jpg": "It is cut off.", "photos/a.jpg": "It is empty."},
        "command": "python -m training transfer --dataset photos",
        "settings": {"recipe": "transfer", "alpha": 1.0, "stages": None},
        "versions": {"python": "3.11.2", "keras": "3.15.1"},
        "phases": {"head alone": history(9), "fine-tuning": history(5, learning_rate=[1e-3, 8e-4, 5e-4, 2e-4, 0.0])},
    }
    return page.Report(**{**given, **changes})


def test_the_page_needs_nothing_but_itself(tmp_path):
    page.write(tmp_path / "report.html", report())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    text = (tmp_path / "report.html").read_text("utf-8")
    found = Page(text)
    for name, attributes, _ in found.elements:
        assert not attributes.keys() & {"srcset", "action", "background", "onclick", "onload", "onerror"}, name
        for key in ("src", "href"):
            assert attributes.get(key, "data:").startswith(("data:", "#")), attributes
    style = found.all("style")[0][1]
    assert "url(" not in style
    assert "@import" not in style
    ((policy, _),) = found.all("meta", **{"http-equiv": "Content-Security-Policy"})
    (_, script), (_, data) = found.all("script")[-1], found.all("script")[0]
    inside = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    assert policy["content"].split("; ")[:4] == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
    ]
    assert "use strict" in script
    assert [len(chart["x"]) for chart in json.loads(data)] == [14, 14, 14]


def test_the_page_is_made_for_all_readers():
    found = Page(page.html(report()))
    assert found.all("html")[0][0]["lang"] == "en"
    assert found.all("title")[0][1] == "transfer on torch"
    levels = [int(name[1]) for name, _, _ in found.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    pictures = found.all("img")
    assert len(pictures) == 2 * 3
    assert all(attributes["alt"] for attributes, _ in pictures)
    assert all(attributes["scope"] in ("row", "col") for attributes, _ in found.all("th"))
    ids = [attributes["id"] for _, attributes, _ in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes, _ in found.all("a")]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert len(links) == 6


def test_the_page_says_what_was_found():
    found = Page(page.html(report()))
    text = " ".join(" ".join(found.elements[0][2]).split())
    for part in (
        "90.00% of 68 images",
        "python -m training transfer --dataset photos",
        "It is cut off.",
        "3.15.1",
        "Images that could not be read: 2",
        "predicted cat 87.5% true dog 6.2% dog/0.jpg",
        "dog 25 80.0% 87.0% 83.3%",
    ):
        assert part in text
    ((_, row),) = found.all("tr", **{"data-of": "25"})
    assert row == "dog520"
    shaded = [attributes["class"] for attributes, _ in found.all("td") if "--fraction" in attributes.get("style", "")]
    assert shaded == ["right", "wrong", "wrong", "right", "right", *["bar"] * 9]


def test_names_are_shown_as_text():
    strange = report(
        class_names=[MARKUP, BREAKS, "fox"],
        title=MARKUP,
        subtitle=BREAKS,
        results=[(MARKUP, BREAKS)],
        unreadable={MARKUP: BREAKS},
        command=f"python -m training --dataset '{BREAKS}'",
        settings={MARKUP: BREAKS},
        versions={MARKUP: BREAKS},
        phases={MARKUP: history(2), BREAKS: history(2)},
        no_maps=MARKUP,
    )
    strange = dataclasses.replace(
        strange,
        mistakes=[
            dataclasses.replace(one, name=f"{MARKUP}{BREAKS}", label=MARKUP, prediction=BREAKS)
            for one in strange.mistakes
        ],
    )
    plain, found = Page(page.html(report(no_maps="none"))), Page(page.html(strange))
    assert {name for name, _, _ in found.elements} <= {name for name, _, _ in plain.elements}
    assert len(found.all("img")) == len(plain.all("img"))
    assert all(attributes["src"].startswith("data:") for attributes, _ in found.all("img"))
    assert not [attributes for _, attributes, _ in found.elements if "onerror" in attributes]
    assert found.all("title")[0][1] == found.all("h1")[0][1] == MARKUP
    assert MARKUP in [text for _, text in found.all("th")]
    assert BREAKS in [text for _, text in found.all("th")]
    assert BREAKS in [text for _, text in found.all("code")]
    data = found.all("script", id="points")[0][1]
    assert "<" not in data
    assert json.loads(data)[0]["epochs"][0] == f"{MARKUP}, epoch 1"


def test_parts_that_a_run_lacks_are_left_out():
    found = Page(page.html(report(phases={}, mistakes=[], unreadable={}, command="", matrix=20 * np.eye(3, dtype=int))))
    ids = {attributes["id"] for _, attributes, _ in found.elements if "id" in attributes}
    assert {"curves", "points", "unreadable"} & ids == set()
    assert not found.all("img")
    assert not found.all("pre")
    assert "each image was given its class" in "".join(found.elements[0][2])
    bare = report(no_maps="litert gives the scores alone.")
    bare = dataclasses.replace(bare, mistakes=[dataclasses.replace(one, heat=None) for one in bare.mistakes])
    found = Page(page.html(bare))
    assert len(found.all("img")) == 3
    assert "Without activation maps: litert gives the scores alone." in "".join(found.elements[0][2])


def test_a_thousand_classes_and_photographs_stay_a_small_file():
    large = report(classes=1000, wrong=24, side=224)
    found = Page(page.html(large))
    assert len(page.html(large)) < 3_000_000
    assert not found.all("table", **{"class": "matrix"})
    pairs, classes = found.all("table", **{"class": "sortable"})
    assert " ".join(pairs[1].split()).endswith("dogcat520.0% catdog313.0%")
    assert "class 999" in classes[1]
    assert page.html(report(classes=page.MOST_CLASSES)).count("data-of") == page.MOST_CLASSES


@pytest.mark.parametrize(("side", "channels", "expected"), [(8, 1, 128), (32, 3, 128), (100, 1, 200), (500, 3, 256)])
def test_pictures_have_a_size_that_can_be_seen(side, channels, expected):
    pixels = np.full((side, side, channels), 90, "uint8")
    kind, content = page.picture(pixels).split(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == (expected, expected)
        assert np.abs(np.asarray(image).astype(int) - 90).max() <= 2


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.13, 0.131), (2.3, 2.3), (0.0, 0.0), (-1.0, 40.0), (1e-5, 3e-4), (0.91, 1.0)]
)
def test_ticks_are_few_round_numbers_around_the_values(low, high):
    ticks = curves.nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    steps = np.diff(ticks)
    assert steps == pytest.approx(steps[0])
    digits = f"{steps[0]:.6e}".partition("e")[0].rstrip("0")
    assert digits in ("1.", "2.", "2.5", "5."), digits


def test_the_places_of_a_chart():
    phases = {
        "head alone": {"loss": [3.0, 2.0], "val_loss": [2.5, math.nan]},
        "fine-tuning": {"loss": [1.0], "val_loss": [1.0], "learning_rate": [0.1]},
    }
    loss, rate = curves.charts(phases)
    assert (loss["title"], rate["title"]) == ("Loss", "Learning rate")
    assert [(phase["name"], phase["left"], phase["width"]) for phase in loss["phases"]] == [
        ("head alone", 0, 50),
        ("fine-tuning", 50, 50),
    ]
    assert [tick["label"] for phase in loss["phases"] for tick in phase["ticks"]] == ["1", "2", "1"]
    assert [(tick["label"], tick["at"]) for tick in loss["ticks"]] == [
        ("1", 100),
        ("1.5", 75),
        ("2", 50),
        ("2.5", 25),
        ("3", 0),
    ]
    training, validation = loss["lines"]
    assert training == {"name": "training", "paths": [[(12.5, 0), (37.5, 50)], [(75, 100)]]}
    assert validation["paths"] == [[(12.5, 25)], [(75, 100)]], "what is no number breaks the line"
    assert loss["points"] == {
        "x": [12.5, 37.5, 75],
        "epochs": ["head alone, epoch 1", "head alone, epoch 2", "fine-tuning, epoch 1"],
        "lines": [
            {"name": "training", "y": [0, 50, 100], "values": ["3.0000", "2.0000", "1.0000"]},
            {"name": "validation", "y": [25, None, 100], "values": ["2.5000", None, "1.0000"]},
        ],
    }
    assert curves.charts({}) == []
    assert curves.charts({"training": {"loss": [math.inf]}}) == []


def test_the_summary_has_the_results_and_a_link(tmp_path):
    summary.write(tmp_path / "report.md", "digits on jax", [("test accuracy", "97.5% of 360 images")], "report.html")
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# digits on jax\n")
    assert "| test accuracy | 97.5% of 360 images |" in text
    assert "[report.html](report.html)" in text


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(width, tmp_path):
    """Needs Chromium: what a reader sees and does on a desktop and on a phone."""
    names = ["cat", "dog", "fox", MARKUP, *(f"a class with a long name, number {i}" for i in range(16))]
    shown = report(classes=20, wrong=10, class_names=names)
    page.write(tmp_path / "report.html", shown)
    (tmp_path / "profile").mkdir()
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "report.html", width)
        assert browser.run("innerWidth") == width
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth >= 128)")

        browser.point(".plot", 0.999)
        assert browser.run("tip.hidden") is False
        assert browser.run("tip.textContent") == "fine-tuning, epoch 5\ntraining 0.2000\nvalidation 0.2000"
        browser.run("document.querySelector('.plot').focus()")
        browser.press("ArrowLeft", 37)
        assert browser.run("tip.textContent").startswith("fine-tuning, epoch 4\n")
        browser.press("Escape", 27)
        assert browser.run("tip.hidden") is True

        browser.point(".matrix .wrong")
        assert browser.run("tip.textContent") == "true cat, predicted dog: 3 of 23"
        box = browser.run("(({left, right}) => [left, right])(tip.getBoundingClientRect())")
        assert 0 <= box[0] < box[1] <= width

        table = "document.querySelector('#classes table')"
        first = f"{table}.tBodies[0].rows[0].cells[0].textContent"
        heading = f"{table}.tHead.rows[0].cells"
        browser.run(f"{heading}[2].querySelector('button').focus()")
        browser.press("Enter", 13, "\r")
        assert browser.run(f"{heading}[2].getAttribute('aria-sort')") == "ascending"
        assert browser.run(first) == "dog"
        browser.press(" ", 32, " ")
        assert browser.run(f"{heading}[2].getAttribute('aria-sort')") == "descending"
        assert browser.run(first) != "dog"
        browser.run(f"{heading}[0].querySelector('button').click()")
        assert browser.run(f"[...{heading}].map(cell => cell.getAttribute('aria-sort'))") == [
            "ascending",
            *[None] * 4,
        ]
        assert browser.run(f"[...{table}.tBodies[0].rows].map(row => row.cells[0].textContent)") == sorted(
            names[3:4]
        ) + [f"a class with a long name, number {i}" for i in range(16)] + ["cat", "dog", "fox"]

        for scheme in ("light", "dark"):
            browser.open(tmp_path / "report.html", width, scheme=scheme)
            assert contrasts(browser) >= 4.5
        browser.run("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        assert browser.complaints() == []


CONTRAST = Path(__file__).with_name("contrast.js")


def contrasts(browser):
    """The least contrast of any text with what lies behind it (WCAG 2.2, success criterion 1.4.3)."""
    return browser.run(CONTRAST.read_text("utf-8"))
