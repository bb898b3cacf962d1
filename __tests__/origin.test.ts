import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { runInNewContext } from 'node:vm';
import { transformSync } from '@swc/core';
import { root } from './support/typescript';

describe('in a bundle, which is one file with the application', () => {
  it.each([
    ['an ES module', {}],
    ['CommonJS', { __dirname }],
  ])('knows who has called (%s)', (_kind, globals) => {
    const source = readFileSync(join(root, 'lib/origin.ts'), 'utf8');
    const { code } = transformSync(source, { jsc: { parser: { syntax: 'typescript' } }, module: { type: 'commonjs' } });
    const exports = {} as { stackOfCaller(): string };
    runInNewContext(code, { exports, ...globals }, { filename: join(__dirname, 'bundle.js') });
    expect(exports.stackOfCaller()).toContain(__filename);
  });
});
