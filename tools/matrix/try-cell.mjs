import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { run } from './run.mjs';

/**
 * @typedef {import('./install.mjs').Installed} Installed
 *
 * @typedef {object} Outcome
 * @property {number} passed
 * @property {string[]} failed
 * @property {string[]} passedAlone failed among the others, and passed when their file was run once more, alone
 * @property {Map<string, number>} skipped how many, by reason
 *
 * @typedef {{ status: string, fullName: string, failureMessages?: string[] }} Assertion
 * @typedef {{ name: string, message: string, assertionResults: Assertion[] }} FileResult
 */

/** A cell takes a minute or two; one that takes so long hangs. */
const CELL_LIMIT_MS = 600_000;
/** With more, it is not the machine that is at fault. */
const MOST_FILES_AGAIN = 8;

const root = fileURLToPath(new URL('../../', import.meta.url));
const jest = join(root, 'node_modules', 'jest', 'bin', 'jest.js');

/**
 * Runs the core's tests on what is installed.
 *
 * @param {Installed} installed
 * @param {string} folder
 * @returns {Promise<Outcome>}
 */
export async function tryCell(installed, folder) {
  const first = await runJest(installed, join(folder, 'first.json'), []);
  const failures = failuresOf(first);
  const files = [...new Set(failures.map(({ file }) => file))];
  const again =
    files.length > 0 && files.length <= MOST_FILES_AGAIN ? await runJest(installed, join(folder, 'again.json'), files) : undefined;
  const failed = (again === undefined ? failures : failuresOf(again)).map(({ text }) => text);

  const assertions = first.flatMap(({ assertionResults }) => assertionResults);
  const secondary = again?.flatMap(({ assertionResults }) => assertionResults) ?? [];
  const passedNow = (/** @type {string} */ fullName) => secondary.some((one) => one.fullName === fullName && one.status === 'passed');
  const passedAlone = assertions
    .filter(({ status, fullName }) => status === 'failed' && passedNow(fullName))
    .map(({ fullName }) => fullName);
  /** @type {Map<string, number>} */
  const skipped = new Map();
  for (const { status, fullName } of assertions) {
    if (status === 'passed' || status === 'failed') continue;
    const reason = fullName.match(/\(skipped[^:]*: (.*)\)$/)?.[1];
    if (reason === undefined) failed.push(`${fullName}\n  was skipped without a reason`);
    else skipped.set(reason, (skipped.get(reason) ?? 0) + 1);
  }
  return { passed: assertions.filter(({ status }) => status === 'passed').length + passedAlone.length, failed, passedAlone, skipped };
}

/**
 * @param {Installed} installed
 * @param {string} outputFile
 * @param {string[]} files none: all of the core
 * @returns {Promise<FileResult[]>}
 */
async function runJest({ modules, node, postgres, versions }, outputFile, files) {
  const args = [jest, '--config', join(root, 'jest.matrix.config.js'), '--json', `--outputFile=${outputFile}`, '--silent'];
  if (files.length > 0) args.push('--runInBand', '--runTestsByPath', ...files);
  const { output } = await run(node, args, {
    cwd: root,
    limitMs: CELL_LIMIT_MS,
    env: {
      ...process.env,
      MATRIX_CELL: JSON.stringify({ modules, versions }),
      ...(postgres !== undefined && { MATRIX_POSTGRES: postgres }),
    },
  });
  const text = await readFile(outputFile, 'utf8').catch(() => undefined);
  if (text === undefined) throw new Error(`Jest did not come to its end:\n${output.slice(-3_000)}`);
  return JSON.parse(text).testResults;
}

/** @param {FileResult[]} results */
function failuresOf(results) {
  return results.flatMap(({ name: file, message, assertionResults }) => {
    const failed = assertionResults
      .filter(({ status }) => status === 'failed')
      .map(({ fullName, failureMessages = [] }) => ({ file, text: `${fullName}\n${indented(failureMessages.join('\n'))}` }));
    // A file that could not be run, or whose afterAll has failed.
    return message && failed.length === 0 && /(●|Error)/.test(message) ? [{ file, text: `${file}\n${indented(message)}` }] : failed;
  });
}

/** @param {string} text */
function indented(text) {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: Jest's colours.
  const plain = text.replace(/\u001b\[\d*m/g, '');
  return plain
    .split('\n')
    .filter((line) => line.trim() !== '')
    .slice(0, 12)
    .map((line) => `  ${line}`)
    .join('\n');
}
