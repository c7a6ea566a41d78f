// One ONNX file in Node.js: `node runner.mjs PACKAGE FILE IMAGES.json SCORES.json`. The images are raw pixels,
// {shape: [images, height, width, 3], values: [...]}; they go in one at a time, in the layout of the file.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, join } from "node:path";

const [name, file, imagesFile, scoresFile] = process.argv.slice(2);
const require = createRequire(join(process.cwd(), "package.json"));
const runtime = require(name);
const { shape, values } = JSON.parse(readFileSync(imagesFile, "utf8"));
const [count, height, width, channels] = shape;
const first = basename(file).startsWith("nchw");
const session = await runtime.InferenceSession.create(new Uint8Array(readFileSync(file)));
const scores = [];
for (let i = 0; i < count; i++) {
  const size = height * width * channels;
  let pixels = Float32Array.from(values.slice(i * size, (i + 1) * size));
  if (first) {
    const moved = new Float32Array(size);
    for (let p = 0; p < height * width; p++)
      for (let c = 0; c < channels; c++) moved[c * height * width + p] = pixels[p * channels + c];
    pixels = moved;
  }
  const dims = first ? [1, channels, height, width] : [1, height, width, channels];
  const found = await session.run({ [session.inputNames[0]]: new runtime.Tensor("float32", pixels, dims) });
  scores.push(Array.from(found[session.outputNames[0]].data));
}
writeFileSync(scoresFile, JSON.stringify(scores));
process.exit(0);
