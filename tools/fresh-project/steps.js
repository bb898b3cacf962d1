const { readFileSync } = require('node:fs');
const { join } = require('node:path');

/** @typedef {{ file: string, text: string } | { command: string }} Step */

const RUNNERS = ['Jest', 'Vitest'];
const CHAPTER = 'Testing your app';
const MORE = 'docs/testing.md';

/**
 * What a reader follows, in order: the README's chapter on tests, and the page that it leads to.
 *
 * @param {string} root
 */
exports.readGuide = (root) => {
  const [readme = '', more] = ['README.md', MORE].map((page) => readFileSync(join(root, page), 'utf8'));
  const chapter = readme.split(/^## /m).find((text) => text.startsWith(`${CHAPTER}\n`));
  if (chapter === undefined) throw new Error(`The README has no chapter "${CHAPTER}".`);
  if (!chapter.includes(`](${MORE})`)) throw new Error(`The README's chapter "${CHAPTER}" does not lead to ${MORE}.`);
  return `${chapter}\n${more}`;
};

/**
 * The files and the commands of the guide, in its order, less those that are for another runner.
 *
 * @param {string} guide
 * @param {string} runner as in its heading, "With Jest"
 * @returns {Step[]}
 */
exports.stepsFor = (guide, runner) => {
  if (!RUNNERS.includes(runner)) throw new Error(`Expected one of ${RUNNERS.join(', ')}, got ${runner}.`);
  const others = RUNNERS.filter((name) => name !== runner);

  const steps = /** @type {Step[]} */ ([]);
  for (const part of guide.split(/^#{2,4} /m)) {
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
  if (file === undefined) throw new Error(`A file of the guide does not begin with its name:\n${text}`);
  return { file, text };
}
