/** @typedef {{ cell: string, versions: import('../../__tests__/support/in-matrix.js').Versions | undefined, seconds: number } & import('./try-cell.mjs').Outcome} Result */

const columns = /** @type {const} */ ([
  ['cell', 12],
  ['Express', 8],
  ['Knex', 7],
  ['pg', 7],
  ['PostgreSQL', 10],
  ['Node', 8],
  ['passed', 6],
  ['failed', 6],
  ['skipped', 7],
  ['s', 4],
]);

/** @param {readonly unknown[]} values */
const line = (values) =>
  columns
    .map(([, width], i) => String(values[i] ?? '').padEnd(width))
    .join('  ')
    .trimEnd();

export const headOf = () => line(columns.map(([name]) => name));

/** @param {Result} result */
export function rowOf({ cell, versions, passed, failed, skipped, seconds }) {
  const { express, knex, pg, postgres, node } = versions ?? {};
  return line([cell, express, knex, pg, postgres, node, passed, failed.length, sumOf(skipped), seconds]);
}

/**
 * What failed, what was skipped and why, and the counts that .ci/run reads, by the names that Jest gives them.
 *
 * @param {Result[]} results
 */
export function summaryOf(results) {
  const lines = [''];
  for (const { cell, failed, passedAlone, skipped } of results) {
    for (const [reason, count] of skipped) lines.push(`${cell}: ${count} skipped: ${reason}`);
    for (const name of passedAlone) lines.push(`${cell}: passed when it was run once more, alone: ${name}`);
    for (const text of failed) lines.push(`${cell}: FAILED: ${text}`);
  }
  const sum = (/** @type {(result: Result) => number} */ count) => results.reduce((total, result) => total + count(result), 0);
  const counts = {
    numPassedTests: sum(({ passed }) => passed),
    numFailedTests: sum(({ failed }) => failed.length),
    numPendingTests: sum(({ skipped }) => sumOf(skipped)),
    numRuntimeErrorTestSuites: 0,
    numTodoTests: 0,
  };
  const { numPassedTests, numFailedTests, numPendingTests } = counts;
  lines.push(`${results.length} cells: ${numPassedTests} passed, ${numFailedTests} failed, ${numPendingTests} skipped`);
  return { text: lines.join('\n'), counts };
}

/** @param {Map<string, number>} skipped */
function sumOf(skipped) {
  return [...skipped.values()].reduce((total, count) => total + count, 0);
}
