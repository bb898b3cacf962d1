import { crc32, deflateSync, inflateSync } from 'node:zlib';

/**
 * A screenshot with at most 256 colours, which is a third of the bytes: the most frequent ones stay, and the others, of edges of letters
 * mostly, become the nearest of them.
 *
 * @param {Buffer} png as Chromium makes them: 8 bits for each of RGB or RGBA, not interlaced, nothing transparent
 */
export function withFewColours(png) {
  const { width, height, pixels } = decode(png);
  /** @type {Map<number, number>} */
  const counts = new Map();
  for (const colour of pixels) counts.set(colour, (counts.get(colour) ?? 0) + 1);
  const palette = [...counts.keys()]
    .sort((a, b) => /** @type {number} */ (counts.get(b)) - /** @type {number} */ (counts.get(a)))
    .slice(0, 256);
  const indexes = new Map([...counts.keys()].map((colour) => [colour, nearest(palette, colour)]));

  const rows = Buffer.alloc((width + 1) * height); // Each begins with its filter: none.
  pixels.forEach((colour, i) => {
    rows[i + 1 + Math.floor(i / width)] = /** @type {number} */ (indexes.get(colour));
  });
  const header = Buffer.alloc(13);
  header.writeUInt32BE(width, 0);
  header.writeUInt32BE(height, 4);
  header.set([8, 3], 8); // Eight bits, of a palette.
  const chunks = [chunk('IHDR', header), chunk('PLTE', Buffer.from(palette.flatMap(partsOf)))];
  return Buffer.concat([png.subarray(0, 8), ...chunks, chunk('IDAT', deflateSync(rows, { level: 9 })), chunk('IEND', Buffer.alloc(0))]);
}

/** @param {Buffer} png */
function decode(png) {
  /** @type {Buffer} */
  let header = Buffer.alloc(0);
  const data = [];
  for (let at = 8; at < png.length; at += 12 + png.readUInt32BE(at)) {
    const type = png.toString('latin1', at + 4, at + 8);
    const body = png.subarray(at + 8, at + 8 + png.readUInt32BE(at));
    if (type === 'IHDR') header = body;
    if (type === 'IDAT') data.push(body);
  }
  const [width, height] = [header.readUInt32BE(0), header.readUInt32BE(4)];
  const step = header[9] === 6 ? 4 : 3;
  const stride = width * step;
  const filtered = inflateSync(Buffer.concat(data));
  const bytes = Buffer.alloc(stride * height);
  const pixels = new Uint32Array(width * height);
  for (let y = 0; y < height; y++) {
    const filter = filtered[y * (stride + 1)];
    for (let x = 0; x < stride; x++) {
      const at = y * stride + x;
      const left = x < step ? 0 : Number(bytes[at - step]);
      const above = y === 0 ? 0 : Number(bytes[at - stride]);
      const corner = x < step || y === 0 ? 0 : Number(bytes[at - stride - step]);
      const guess = [0, left, above, (left + above) >> 1, paeth(left, above, corner)][Number(filter)];
      bytes[at] = Number(filtered[at + y + 1]) + Number(guess);
    }
  }
  for (let i = 0; i < pixels.length; i++) pixels[i] = bytes.readUIntBE(i * step, 3);
  return { width, height, pixels };
}

/**
 * @param {number} left
 * @param {number} above
 * @param {number} corner
 */
function paeth(left, above, corner) {
  const [toLeft, toAbove, toCorner] = [left, above, corner].map((value) => Math.abs(left + above - corner - value));
  if (Number(toLeft) <= Number(toAbove) && Number(toLeft) <= Number(toCorner)) return left;
  return Number(toAbove) <= Number(toCorner) ? above : corner;
}

/**
 * @param {number[]} palette
 * @param {number} colour
 */
function nearest(palette, colour) {
  const parts = partsOf(colour);
  const distances = palette.map((other) => partsOf(other).reduce((sum, part, i) => sum + (part - Number(parts[i])) ** 2, 0));
  return distances.indexOf(Math.min(...distances));
}

/** @param {number} colour */
const partsOf = (colour) => [colour >> 16, (colour >> 8) & 255, colour & 255];

/**
 * @param {string} type
 * @param {Buffer} body
 */
function chunk(type, body) {
  const typed = Buffer.concat([Buffer.from(type, 'latin1'), body]);
  const [length, check] = [Buffer.alloc(4), Buffer.alloc(4)];
  length.writeUInt32BE(body.length);
  check.writeUInt32BE(crc32(typed));
  return Buffer.concat([length, typed, check]);
}
