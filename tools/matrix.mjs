/*
 * Runs the core's tests on other versions of Express, Knex, pg, PostgreSQL and Node, one of them changed at a time: see matrix/cells.js.
 * What a cell changes is installed in a temporary folder; this project's node_modules stays as it is.
 *
 * `npm run matrix`, `npm run matrix -- --quick` (a few minutes), or `npm run matrix -- knex3.0 postgres14`
 */
import { chmod, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import cellsModule from './matrix/cells.js';
import { install } from './matrix/install.mjs';
import { headOf, rowOf, summaryOf } from './matrix/report.mjs';
import { stop } from './matrix/run.mjs';
import { tryCell } from './matrix/try-cell.mjs';

const { cells, quickCells } = cellsModule;
const args = process.argv.slice(2);
const names = args.includes('--quick') ? quickCells : args.filter((arg) => !arg.startsWith('--'));
const outputFile = args.find((arg) => arg.startsWith('--outputFile='))?.slice('--outputFile='.length);
const unknown = names.filter((name) => !cells.some((cell) => cell.name === name));
if (unknown.length > 0) {
  console.error(`There is no cell ${unknown.join(', ')}. There are: ${cells.map(({ name }) => name).join(', ')}.`);
  process.exit(2);
}

for (const signal of /** @type {const} */ (['SIGINT', 'SIGTERM', 'SIGHUP'])) process.once(signal, stop);
const folder = await mkdtemp(join(tmpdir(), 'matrix-'));
// As root, PostgreSQL is run by another user.
await chmod(folder, 0o755);
/** @type {import('./matrix/report.mjs').Result[]} */
const results = [];
try {
  console.log(headOf());
  for (const cell of cells) {
    if (names.length > 0 && !names.includes(cell.name)) continue;
    const began = performance.now();
    const cellFolder = join(folder, cell.name);
    /** @type {import('./matrix/install.mjs').Installed | undefined} */
    let installed;
    /** @type {import('./matrix/try-cell.mjs').Outcome} */
    let outcome;
    try {
      installed = await install(cell, cellFolder);
      outcome = await tryCell(installed, cellFolder);
    } catch (error) {
      const { message } = /** @type {Error} */ (error);
      if (message === 'Stopped.') throw error;
      outcome = { passed: 0, failed: [message], passedAlone: [], skipped: new Map() };
    }
    const result = { cell: cell.name, versions: installed?.versions, ...outcome, seconds: Math.round((performance.now() - began) / 1000) };
    results.push(result);
    console.log(rowOf(result));
    // Node and PostgreSQL are large.
    await rm(cellFolder, { recursive: true, force: true, maxRetries: 5 });
  }
  const { text, counts } = summaryOf(results);
  console.log(text);
  if (outputFile !== undefined) await writeFile(outputFile, JSON.stringify(counts));
  process.exitCode = counts.numFailedTests > 0 ? 1 : 0;
} catch (error) {
  console.error(/** @type {Error} */ (error).message);
  process.exitCode = 1;
} finally {
  await rm(folder, { recursive: true, force: true, maxRetries: 5 });
}
