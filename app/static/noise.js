// Drawings of noise: the tiles that wait for a picture, and the strip of the empty page. Decoration, not the model's noise.

/** Mulberry32, a small generator of numbers in [0, 1): a tile looks the same each time its seed is drawn. */
function uniform(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** A square canvas of size × size grey pixels; `grey(x, y)` in [0, 1]. */
function draw(size, grey) {
  const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size, className: "pixels" });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(size, size);
  for (let i = 0; i < size * size; i += 1) {
    const value = Math.min(Math.max(grey(i % size, Math.floor(i / size)), 0), 1) * 255;
    pixels.data.set([value, value, value, 255], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

export function noiseTile(seed, imageSize) {
  const random = uniform(seed);
  return draw(Math.min(imageSize, 32), () => (random() + random() + random()) / 3);
}

/** A lit ball of 16 × 16 pixels under noise of amount 1 … 0, along the path x_t = (1 − t)·x₀ + t·ε. */
export function denoisingStrip(count) {
  return Array.from({ length: count }, (_, index) => {
    const t = 1 - index / (count - 1);
    const random = uniform(7);
    return draw(16, (x, y) => (1 - t) * ball((x - 7.5) / 6.2, (y - 7.5) / 6.2) + t * (0.2 + 0.6 * random()));
  });
}

function ball(x, y) {
  const depth = 1 - x * x - y * y;
  return depth < 0 ? 0 : Math.max(0.08, -0.45 * x - 0.55 * y + 0.7 * Math.sqrt(depth));
}
