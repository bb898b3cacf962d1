/** @typedef {{ file: string, text: string } | { command: string }} Step */

const RUNNERS = ['Jest', 'Vitest'];

/**
 * The files and the commands of the README's chapter "Testing your app", in its order, less those that are for another runner.
 *
 * @param {string} readme
 * @param {string} runner as in its heading, "With Jest"
 * @returns {Step[]}
 */
exports.stepsFor = (readme, runner) => {
  const chapter = readme.split(/^## /m).find((text) => text.startsWith('Testing your app\n'));
  if (chapter === undefined) throw new Error('The README has no chapter "Testing your app".');
  if (!RUNNERS.includes(runner)) throw new Error(`Expected one of ${RUNNERS.join(', ')}, got ${runner}.`);
  const others = RUNNERS.filter((name) => name !== runner);

  const steps = /** @type {Step[]} */ ([]);
  for (const part of chapter.split(/^#{3,4} /m)) {
    if (others.some((other) => part.startsWith(`With ${other}\n`))) continue;
    for (const [, language, text = ''] of part.matchAll(/^```(js|sh)\n([\s\S]*?)^```$/gm)) {
      if (others.some((other) => isFor(other, text))) continue;
      if (language === 'sh') steps.push(...text.trim().split('\n').map(toCommand));
      else steps.push(toFile(text));
    }
  }
  return steps;
};

/**
 * @param {string} runner
 * @param {string} text
 */
function isFor(runner, text) {
  return runner === 'Jest' ? /\bjest\.mock\(|\bnpx jest\b/.test(text) : text.includes("'vitest'");
}

/** @param {string} command */
const toCommand = (command) => ({ command });

/** @param {string} text */
function toFile(text) {
  const [, file] = /^\/\/ (\S+)\n/.exec(text) ?? [];
  if (file === undefined) throw new Error(`A file of the README does not begin with its name:\n${text}`);
  return { file, text };
}
