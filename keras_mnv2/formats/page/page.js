// The page: a photograph or the camera in, the best classes out. All files come from the page's own folder.

import * as ort from "./runtime/ort.js";
import { resizeAndCrop } from "./resize.js";

const TOP = 5;
// Phones cannot draw more pixels at once.
const MOST_PIXELS = 16e6;
const element = (id) => document.getElementById(id);
const [drop, photograph, camera, hint, file, useCamera, status, none, best, time] =
  ["drop", "photograph", "camera", "hint", "file", "use-camera", "status", "none", "best", "time"].map(element);
const canvas = document.createElement("canvas");

let about, session, stream;
// What was asked for last: answers to what came before are not shown.
let turn = 0;

/** What the page knows of its model, once it is loaded. */
export const ready = start();

async function start() {
  try {
    const [told, model, runtime] = await Promise.all(["about.json", "model.onnx", "runtime/ort.wasm"].map(fetched));
    about = await told.json();
    ort.env.wasm.wasmPaths = { mjs: new URL("runtime/ort-wasm.js", import.meta.url).href };
    ort.env.wasm.wasmBinary = await runtime.arrayBuffer();
    // More threads need headers that few servers send.
    ort.env.wasm.numThreads = 1;
    session = await ort.InferenceSession.create(new Uint8Array(await model.arrayBuffer()));
  } catch (error) {
    tell(`The model could not be loaded: ${error.message}`, true);
    throw error;
  }
  file.disabled = useCamera.disabled = false;
  tell("");
  return about;
}

async function fetched(name) {
  const answer = await fetch(new URL(name, import.meta.url));
  if (!answer.ok) throw new Error(`${name} is missing (status ${answer.status})`);
  return answer;
}

/**
 * The scores of an image as the model gives them, their probabilities, and how long it took.
 *
 * @param {ArrayLike<number>} pixels of 0..255, size x size x 3, row by row
 */
export async function classify(pixels) {
  const { size, mean, std, channels_first } = about;
  const image = new Float32Array(size * size * 3);
  for (let i = 0; i < size * size; i++) {
    for (let c = 0; c < 3; c++) {
      image[channels_first ? c * size * size + i : i * 3 + c] = (pixels[i * 3 + c] - mean[c]) / std[c];
    }
  }
  const begin = performance.now();
  const shape = channels_first ? [1, 3, size, size] : [1, size, size, 3];
  const found = await session.run({ [session.inputNames[0]]: new ort.Tensor("float32", image, shape) });
  const milliseconds = performance.now() - begin;
  const scores = Array.from(found[session.outputNames[0]].data);
  return { scores, probabilities: probabilities(scores), milliseconds };
}

/** The softmax of logits; what sums to one already stays. */
function probabilities(scores) {
  const sum = scores.reduce((a, b) => a + b, 0);
  if (scores.every((s) => s >= 0 && s <= 1.001) && Math.abs(sum - 1) <= 1e-3) return scores;
  const most = Math.max(...scores);
  const exponentials = scores.map((s) => Math.exp(s - most));
  const total = exponentials.reduce((a, b) => a + b, 0);
  return exponentials.map((e) => e / total);
}

/** The pixels of a photograph or of the camera's picture, as the model takes them. */
export function prepare(source, width, height) {
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (width * height)));
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  const image = new Uint8ClampedArray(canvas.width * canvas.height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4, to += 3) {
    image[to] = data[from];
    image[to + 1] = data[from + 1];
    image[to + 2] = data[from + 2];
  }
  return resizeAndCrop(image, canvas.width, canvas.height, about);
}

/** Shows a photograph and what is on it; gives the answer. */
export async function classifyFile(blob) {
  stopCamera();
  const mine = ++turn;
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  } catch {
    tell(`${blob.name || "The file"} is no photograph that this browser can read.`, true);
    return null;
  }
  URL.revokeObjectURL(photograph.src);
  photograph.src = URL.createObjectURL(blob);
  photograph.alt = `The photograph ${blob.name || ""}`.trim();
  show(photograph);
  tell("Looking …");
  // The browser draws the photograph before the model takes the processor.
  await new Promise((done) => setTimeout(done, 30));
  try {
    const answer = await classify(prepare(bitmap, bitmap.width, bitmap.height));
    if (mine === turn) {
      showAnswer(answer);
      tell("");
    }
    return answer;
  } catch (error) {
    tell(`The model failed: ${error.message}`, true);
    return null;
  } finally {
    bitmap.close();
  }
}

function showAnswer({ probabilities, milliseconds }) {
  const order = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]).slice(0, TOP);
  best.replaceChildren(...order.map((i) => {
    const [row, name, share, bar, filled] = ["li", "span", "span", "div", "i"].map((kind) => document.createElement(kind));
    // Names are text, whatever is in them.
    name.textContent = about.labels[i];
    share.textContent = `${(100 * probabilities[i]).toFixed(1)} %`;
    [share.className, bar.className] = ["share", "bar"];
    filled.style.width = `${100 * probabilities[i]}%`;
    bar.ariaHidden = "true";
    bar.append(filled);
    row.append(name, share, bar);
    return row;
  }));
  none.hidden = true;
  time.textContent = `${milliseconds.toFixed(0)} ms for the model`;
}

function show(shown) {
  for (const one of [photograph, camera, hint]) one.hidden = one !== shown;
  drop.classList.toggle("filled", shown !== hint);
}

function tell(text, wrong = false) {
  status.textContent = text;
  status.classList.toggle("wrong", wrong);
}

async function startCamera() {
  if (!navigator.mediaDevices) {
    tell("A browser gives the camera only to pages from https:// or http://localhost.", true);
    return;
  }
  const mine = ++turn;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    tell(`The camera cannot be used: ${error.message}`, true);
    return;
  }
  camera.srcObject = stream;
  await camera.play();
  show(camera);
  useCamera.textContent = "Stop the camera";
  tell("The camera is on.");
  // Names that change all the time are not read out.
  best.ariaLive = "off";
  while (mine === turn && stream) {
    const answer = await classify(prepare(camera, camera.videoWidth, camera.videoHeight));
    if (mine === turn && stream) showAnswer(answer);
    await new Promise((done) => requestAnimationFrame(done));
  }
}

function stopCamera() {
  if (!stream) return;
  for (const track of stream.getTracks()) track.stop();
  stream = camera.srcObject = null;
  turn++;
  useCamera.textContent = "Use the camera";
  best.ariaLive = "polite";
  tell("");
  show(hint);
}

file.addEventListener("change", () => {
  if (file.files.length) classifyFile(file.files[0]);
  // The same photograph may be chosen again.
  file.value = "";
});
useCamera.addEventListener("click", () => (stream ? stopCamera() : startCamera()));
for (const kind of ["dragover", "dragleave", "drop"]) {
  // Anywhere on the page: a photograph that misses the field would else be opened in its place.
  addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    const [first] = kind === "drop" ? event.dataTransfer.files : [];
    if (first && session) classifyFile(first);
  });
}
