/*
 * Tries the recipe docs/recipes/graphql.md with Apollo Server itself: its types, and what it does. Apollo brings more than a hundred packages,
 * so it is installed in a folder of its own, which goes with the run.
 *
 * `npm run test:apollo`, with Jest's options
 */
import { spawn } from 'node:child_process';
import { chmod, cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

/** GraphQL 17 needs Node 22. */
const PACKAGES = [
  '@apollo/server@5',
  '@as-integrations/express5@1',
  'graphql@16',
  'express@5',
  '@types/express@5',
  '@types/node@20',
  'knex@3',
  'pg@8',
];

/** What the recipe takes for granted. */
const AMBIENT = `
  import type expressModule from 'express';
  import type * as ours from 'express-knex-session';
  declare global {
    const express: typeof expressModule;
    const app: expressModule.Express;
    const knex: import('knex').Knex;
    const typeDefs: string;
    const resolvers: Record<string, Record<string, () => unknown>>;
    const sessionMiddleware: typeof ours.sessionMiddleware;
    const sessionErrorHandler: typeof ours.sessionErrorHandler;
  }
`;

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const tsc = join(root, 'node_modules/typescript/bin/tsc');
const jest = join(root, 'node_modules/jest/bin/jest.js');
const folder = await mkdtemp(join(tmpdir(), 'apollo-'));
// As root, PostgreSQL is run by another user.
await chmod(folder, 0o755);
let child = /** @type {import('node:child_process').ChildProcess | undefined} */ (undefined);
for (const signal of /** @type {const} */ (['SIGINT', 'SIGTERM', 'SIGHUP'])) process.once(signal, () => child?.kill());

try {
  await installApollo();
  await compileRecipe();
  await run(process.execPath, [jest, '--config', join(root, 'jest.apollo.config.js'), ...process.argv.slice(2)], {
    cwd: root,
    env: { ...process.env, APOLLO_MODULES: join(folder, 'node_modules') },
  });
} catch (error) {
  console.error(/** @type {Error} */ (error).message);
  process.exitCode = 1;
} finally {
  await rm(folder, { recursive: true, force: true, maxRetries: 5 });
}

async function installApollo() {
  await writeFile(join(folder, 'package.json'), JSON.stringify({ private: true, type: 'module' }));
  // What npm tells its scripts would lead this npm astray.
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^npm_(?!config_)/.test(name)));
  const options = ['--no-audit', '--no-fund', '--ignore-scripts', '--no-package-lock', '--loglevel=error'];
  await run('npm', ['install', ...options, ...PACKAGES], { cwd: folder, env, shell: process.platform === 'win32' });
}

async function compileRecipe() {
  const recipe = await readFile(join(root, 'docs/recipes/graphql.md'), 'utf8');
  const [, code] = /^```ts\n([\s\S]*?)^```$/m.exec(recipe) ?? [];
  if (code === undefined) throw new Error('docs/recipes/graphql.md has no example.');
  const ours = join(folder, 'node_modules/express-knex-session');
  await run(process.execPath, [tsc, '-p', join(root, 'tsconfig.build.json'), '--emitDeclarationOnly', '--outDir', join(ours, 'dist')]);
  await cp(join(root, 'package.json'), join(ours, 'package.json'));
  await writeFile(join(folder, 'recipe.ts'), code);
  await writeFile(join(folder, 'ambient.d.ts'), AMBIENT);
  // Not the declarations of others: those of Apollo are for its own compiler options.
  const compilerOptions = { strict: true, skipLibCheck: true, module: 'nodenext', target: 'es2022', types: ['node'], noEmit: true };
  await writeFile(join(folder, 'tsconfig.json'), JSON.stringify({ compilerOptions, files: ['recipe.ts', 'ambient.d.ts'] }));
  await run(process.execPath, [tsc, '--pretty', 'false', '-p', folder]);
}

/**
 * @param {string} program
 * @param {string[]} args
 * @param {import('node:child_process').SpawnOptions} [options]
 */
async function run(program, args, options = {}) {
  const started = spawn(program, args, { ...options, stdio: 'inherit' });
  child = started;
  const status = await new Promise((resolve, reject) => started.once('error', reject).once('close', resolve));
  if (status !== 0) throw new Error(`Failed (${status}): ${[program, ...args].join(' ')}`);
}
