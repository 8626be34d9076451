// The built-in world without a network, as fastlightgen/world and flow.py have it: sentences, noise, sampling, pixels.

const WIDTH = 48;  // numbers per token: 32 for the word, 16 for its place

// Sylvester's Hadamard matrix: the sign is the parity of the bits that row and column share.
function hadamard(row, column) {
  let sign = 1;
  for (let bits = row & column; bits; bits &= bits - 1) sign = -sign;
  return sign;
}

export const tidy = (prompt) => prompt.toLowerCase().replace(/[.,;:!?"“”]/g, " ").trim().replace(/\s+/g, " ");

// Throws one line for a reader if the world does not know this sentence.
export function check(prompt, { words, tokens }) {
  const given = prompt.split(" ").filter(Boolean);
  const known = words.filter((word) => word !== "<end>");
  const unknown = given.find((word) => !known.includes(word));
  if (!given.length) throw new Error("Write a sentence first, or pick one below.");
  if (unknown) throw new Error(`This small world has no word “${unknown}”. It knows ${known.join(", ")}.`);
  if (given.length >= tokens) throw new Error(`That is ${given.length} words; this world reads ${tokens - 1} at most.`);
}

// The network's text input: a row of the Hadamard matrix for each word, and 4 at the word's place.
export function encode(prompt, { words, tokens }) {
  const text = new Float32Array(tokens * WIDTH);
  [...prompt.split(" ").filter(Boolean), "<end>"].forEach((word, place) => {
    const row = words.indexOf(word) + 1;
    for (let i = 0; i < 32; i++) text[place * WIDTH + i] = hadamard(row, i);
    text[place * WIDTH + 32 + place] = 4;
  });
  return text;
}

// The ways to go on, as places in this list: captions name the new direction of a turn.
export function changes(direction, { directions }) {
  const turned = (quarter) => `turns ${directions[(directions.indexOf(direction) + quarter + 4) % 4]}`;
  return ["goes on", "stops", turned(1), turned(-1), "turns back"];
}

// The sentence of these choices; `other`: the companion's colour and kind, or nothing.
export function caption({ colour, kind, direction, speed, change, other }, choices) {
  const then = changes(direction, choices)[change];
  return `a ${colour} ${kind} moves ${direction} ${speed} then ${then}${other ? ` with a ${other}` : ""}`;
}

// The choices that make this sentence; null if the world's clips never had such a caption.
export function parse(prompt, choices) {
  const found = prompt.match(/^a (\w+) (\w+) moves (\w+) (\w+) then (.+?)(?: with a (\w+ \w+))?$/);
  if (!found) return null;
  const [, colour, kind, direction, speed, then, other = ""] = found, [shade, shape] = other.split(" ");
  const { colours, kinds, directions, speeds } = choices, change = changes(direction, choices).indexOf(then);
  const known = colours.includes(colour) && kinds.includes(kind) && directions.includes(direction) &&
    speeds.includes(speed) && change >= 0 && (!other || colours.includes(shade) && kinds.includes(shape));
  return known ? { colour, kind, direction, speed, change, other } : null;
}

// Normal numbers without end, `count` at a time: Box and Muller's pairs of the uniform numbers of mulberry32.
export function* noise(seed, count) {
  let state = seed >>> 0;
  const uniform = () => {
    state = state + 0x6d2b79f5 >>> 0;
    let x = Math.imul(state ^ state >>> 15, state | 1);
    x ^= x + Math.imul(x ^ x >>> 7, x | 61);
    return ((x ^ x >>> 14) >>> 0) / 2 ** 32;
  };
  while (true) {
    const out = new Float32Array(count);
    for (let i = 0; i < count; i += 2) {
      const radius = Math.sqrt(-2 * Math.log(1 - uniform())), angle = 2 * Math.PI * uniform();
      out[i] = radius * Math.cos(angle);
      if (i + 1 < count) out[i + 1] = radius * Math.sin(angle);
    }
    yield out;
  }
}

// Walks down the times, and yields the estimate of the clip after each step: x - t v. The last one is the clip.
export async function* sample(predict, times, sampler, noises) {
  let x = noises.next().value;
  for (const [i, t] of times.entries()) {
    const after = times[i + 1] ?? 0, v = await predict(x, t);
    yield x.map((value, k) => value - t * v[k]);
    if (sampler === "ode") {
      x = x.map((value, k) => value + (after - t) * v[k]);
    } else if (after) {
      const fresh = noises.next().value;
      x = x.map((value, k) => (1 - after) * (value - t * v[k]) + after * fresh[k]);
    }
  }
}

// Latents as frames, RGBA [frame, row, column]: a Haar transform of 2 x 2 pixels. Channel = 4 * colour + band.
export function pixels(latents, [, , frames, height, width], { low_mean, scale }) {
  const out = new Uint8ClampedArray(frames * 4 * height * width * 4).fill(255);
  const plane = frames * height * width;
  for (let colour = 0; colour < 3; colour++) {
    for (let place = 0; place < plane; place++) {
      const bands = [0, 1, 2, 3].map((band) => latents[(4 * colour + band) * plane + place] / scale);
      bands[0] += low_mean;
      const column = place % width, line = Math.floor(place / width);  // the line counts through all frames
      for (let pixel = 0; pixel < 4; pixel++) {
        const value = bands.reduce((sum, band, i) => sum + hadamard(pixel, i) * band, 0) / 2;
        const row = 2 * line + (pixel >> 1), at = row * 2 * width + 2 * column + (pixel & 1);
        out[4 * at + colour] = Math.round(255 * value);
      }
    }
  }
  return out;
}
