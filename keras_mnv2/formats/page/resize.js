// Pixels as Pillow resizes and crops them: antialiased, in whole numbers, first along rows and then along columns.

const FILTERS = {
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, (x) => {
    const a = Math.abs(x);
    if (a < 1) return (1.5 * a - 2.5) * a * a + 1;
    return a < 2 ? ((-0.5 * a + 2.5) * a - 4) * a + 2 : 0;
  }],
};
// Weights are whole multiples of this share.
const ONE = 2 ** 22;

/** For each pixel of the result: the first pixel that it comes from, and the weights from there on. */
function weightsOf(before, after, name) {
  const [reach, filter] = FILTERS[name];
  const scale = before / after;
  const width = Math.max(scale, 1);
  return Array.from({ length: after }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach * width + 0.5));
    const end = Math.min(before, Math.trunc(centre + reach * width + 0.5));
    const weights = Array.from({ length: end - first }, (_, k) => filter((first + k - centre + 0.5) / width));
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, weights.map((w) => Math.round((w / sum) * ONE))];
  });
}

/** Resizes along one axis of `lines` lines; both arrays have three bytes a pixel. */
function resizeAxis(source, lines, before, after, name, sourceAt, targetAt) {
  const target = new Uint8ClampedArray(lines * after * 3);
  const table = weightsOf(before, after, name);
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < after; i++) {
      const [first, weights] = table[i];
      let red = ONE / 2, green = ONE / 2, blue = ONE / 2;
      for (let k = 0; k < weights.length; k++) {
        const at = sourceAt(line, first + k);
        red += source[at] * weights[k];
        green += source[at + 1] * weights[k];
        blue += source[at + 2] * weights[k];
      }
      const at = targetAt(line, i);
      target[at] = Math.floor(red / ONE);
      target[at + 1] = Math.floor(green / ONE);
      target[at + 2] = Math.floor(blue / ONE);
    }
  }
  return target;
}

/** Half of an odd difference goes to the even number, or down. */
function corner(difference, how) {
  const half = Math.trunc(difference / 2);
  return how === "round" && difference % 2 && half % 2 ? half + 1 : half;
}

/**
 * The centre of an image, its shorter side resized first.
 *
 * @param {Uint8ClampedArray} image three bytes a pixel, row by row
 * @param {object} how `resize` and `size` in pixels, `interpolation` and `crop_rounding`, as keras_mnv2 has them
 * @returns {Uint8ClampedArray} size x size pixels of three bytes
 */
export function resizeAndCrop(image, width, height, how) {
  const shorter = how.resize;
  const newWidth = width <= height ? shorter : Math.trunc((shorter * width) / height);
  const newHeight = width <= height ? Math.trunc((shorter * height) / width) : shorter;
  let pixels = image;
  if (shorter !== Math.min(width, height)) {
    if (newWidth !== width) {
      pixels = resizeAxis(pixels, height, width, newWidth, how.interpolation,
        (row, column) => (row * width + column) * 3, (row, column) => (row * newWidth + column) * 3);
    }
    if (newHeight !== height) {
      pixels = resizeAxis(pixels, newWidth, height, newHeight, how.interpolation,
        (column, row) => (row * newWidth + column) * 3, (column, row) => (row * newWidth + column) * 3);
    }
  }
  const left = corner(newWidth - how.size, how.crop_rounding);
  const top = corner(newHeight - how.size, how.crop_rounding);
  const crop = new Uint8ClampedArray(how.size * how.size * 3);
  for (let row = 0; row < how.size; row++) {
    const start = ((top + row) * newWidth + left) * 3;
    crop.set(pixels.subarray(start, start + how.size * 3), row * how.size * 3);
  }
  return crop;
}
