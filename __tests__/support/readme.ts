import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { transformSync } from '@swc/core';
import { root } from './typescript';

export interface Example {
  /** The text of the heading above it. */
  section: string;
  code: string;
}

export const readme = readFileSync(join(root, 'README.md'), 'utf8');

export const headings = [...withoutCode(readme).matchAll(/^## (.+)$/gm)].map(([, heading]) => heading as string);

/** The TypeScript examples, in order. */
export const examples: Example[] = readme.split(/^## /m).flatMap((text) => {
  const section = text.slice(0, text.indexOf('\n')).replace(/^# /, '');
  return [...text.matchAll(/^```ts\n([\s\S]*?)^```/gm)].map(([, code]) => ({ section, code: code as string }));
});

/** The text of a section. */
export function sectionOf(heading: string): string {
  const text = readme.split(/^## /m).find((text) => text.startsWith(`${heading}\n`));
  if (text === undefined) throw new Error(`The README has no section ${heading}.`);
  return text;
}

/** The rows of the first table of a section, its head left out; code marks are taken off. */
export function tableOf(heading: string): string[][] {
  const rows = sectionOf(heading)
    .split('\n')
    .filter((line) => line.startsWith('|'));
  return rows.slice(2).map((row) =>
    row
      .slice(1, -1)
      .split(' | ')
      .map((cell) => cell.trim()),
  );
}

/** The example of a section that has this text in it. */
export function exampleOf(section: string, text = ''): string {
  const example = examples.find((example) => example.section === section && example.code.includes(text));
  if (example === undefined) throw new Error(`The README has no example with '${text}' in ${section}.`);
  return example.code;
}

const AsyncFunction = (async () => {}).constructor as new (...values: string[]) => (...values: unknown[]) => Promise<any>;

/**
 * Runs an example with what it imports, and what it takes for granted, from `scope`.
 *
 * @param result an expression: what to give back of its variables
 */
export async function runExample(code: string, scope: Record<string, unknown>, result = 'undefined'): Promise<any> {
  const { code: javascript } = transformSync(code, {
    jsc: { parser: { syntax: 'typescript' }, target: 'es2022' },
    module: { type: 'es6' },
  });
  const body = javascript.replace(/^import .*$|^export \{.*$|^app\.listen\(.*$/gm, '');
  // A block: the example may declare a name that the scope has too.
  return new AsyncFunction(...Object.keys(scope), `{ ${body}\n return ${result}; }`)(...Object.values(scope));
}

function withoutCode(text: string): string {
  return text.replace(/^```[\s\S]*?^```/gm, '');
}
