import { existsSync } from 'node:fs';
import { join, relative } from 'node:path';
import { typePrograms } from '../tools/packaging/type-programs';
import type { Versions } from './support/in-matrix.js';
import { root, TypeScript } from './support/typescript';

/** A cell of `npm run matrix`; in `npm test` it is what is installed. */
const { modules = '', versions }: { modules?: string; versions?: Versions } = JSON.parse(process.env['MATRIX_CELL'] ?? '{}');

let typescript: TypeScript;
beforeAll(async () => {
  typescript = await TypeScript.open();
});
afterAll(() => typescript.close());

it('types sessions, options and errors with the declarations of this Knex and of this line of Express', async () => {
  const links: Record<string, string> = {};
  if (existsSync(join(modules, 'knex'))) links['knex'] = relative(join(root, 'node_modules'), join(modules, 'knex'));
  if (versions?.express.startsWith('4.')) Object.assign(links, { express: 'express4', '@types/express': '@types/express4' });
  // Knex 3.0 has mistakes in its own.
  const skipLibCheck = versions?.knex.startsWith('3.0.') ?? false;

  const compilerOptions = { exactOptionalPropertyTypes: true, skipLibCheck };
  expect(await typescript.compile({ compilerOptions, links, files: typePrograms()['app'] ?? {} })).toBe('');
});
