const { readdirSync, readFileSync } = require('node:fs');
const { join } = require('node:path');

const folder = join(__dirname, '../../__tests__/types');
/** In files that change the types of a whole program. */
const BY_ITSELF = 'Compiled by itself';

/** @typedef {Record<string, string>} Files names, and what is in them */

/**
 * What TypeScript must make of the package: each file says what must compile and, by @ts-expect-error, what must not.
 *
 * @returns {Record<string, Files>} programs: one of most files, and one for each that needs its own
 */
exports.typePrograms = () => {
  const files = Object.fromEntries(readdirSync(folder).map((name) => [name, readFileSync(join(folder, name), 'utf8')]));
  const testing = readFileSync(join(folder, '../packaging/testing.ts'), 'utf8');
  const programs = /** @type {Record<string, Files>} */ ({ app: { 'testing.ts': testing } });
  for (const [name, text] of Object.entries(files)) {
    if (text.includes(BY_ITSELF)) programs[name.replace('.ts', '')] = { 'equal.ts': files['equal.ts'] ?? '', [name]: text };
    else if (programs['app']) programs['app'][name] = text;
  }
  return programs;
};
