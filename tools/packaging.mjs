/*
 * Installs the packed tarball with npm into empty projects, under Express 5 and Express 4, and uses it: from CommonJS, ESM and TypeScript,
 * against a PostgreSQL of its own. Then it compiles the type tests (__tests__/types) against what was installed, with several releases of
 * TypeScript and every way to find modules. Last, `npm audit`.
 *
 * `npm run packaging`
 */
import { deepStrictEqual } from 'node:assert/strict';
import { rmSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import pg from 'pg';
import { judgeAudit } from './packaging/audit.js';
import { Project, run } from './packaging/project.mjs';
import { typePrograms } from './packaging/type-programs.js';
import { startPostgres } from './postgres.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));

/** The README's chapter on TypeScript names the first and the last. The old ones take seconds each: they see a part. */
const COMPILERS = {
  'typescript-5.0': 'npm:typescript@~5.0.4',
  'typescript-5.9': 'npm:typescript@~5.9.3',
  'typescript-6.0': 'npm:typescript@~6.0.3',
  typescript: '^7.0.2',
};
const node10 = { module: 'commonjs', moduleResolution: 'node10', esModuleInterop: true };
const node16 = { module: 'node16', moduleResolution: 'node16' };
const nodenext = { module: 'nodenext', moduleResolution: 'nodenext' };
const bundler = { module: 'esnext', moduleResolution: 'bundler' };
/** @type {[compiler: keyof typeof COMPILERS, express: 4 | 5, options: Record<string, unknown>, type: 'commonjs' | 'module'][]} */
const COMPILATIONS = [
  ['typescript', 5, node16, 'commonjs'],
  ['typescript', 5, node16, 'module'],
  ['typescript', 5, nodenext, 'commonjs'],
  ['typescript', 5, bundler, 'module'],
  ['typescript', 4, node16, 'commonjs'],
  ['typescript', 4, nodenext, 'module'],
  ['typescript', 4, bundler, 'module'],
  ['typescript-6.0', 5, { ...node10, ignoreDeprecations: '6.0' }, 'commonjs'],
  ['typescript-5.9', 5, bundler, 'module'],
  ['typescript-5.9', 4, node10, 'commonjs'],
  ['typescript-5.0', 5, node10, 'commonjs'],
  ['typescript-5.0', 4, node16, 'commonjs'],
];

const folder = await mkdtemp(join(tmpdir(), 'packaging-'));
for (const signal of /** @type {const} */ (['SIGINT', 'SIGTERM', 'SIGHUP'])) {
  process.once(signal, () => {
    rmSync(folder, { recursive: true, force: true });
    process.exit(1);
  });
}
const server = await startPostgres();
const database = new pg.Client(server.url);
/** @type {Record<number, Project>} */
const projects = {};

try {
  await database.connect();
  await database.query('CREATE TABLE notes (text text)');
  const tarball = await pack();
  for (const express of [5, 4]) {
    // Those that are for both, once.
    const compilers = express === 5 ? Object.entries(COMPILERS).map(([name, version]) => `${name}@${version}`) : [];
    const types = [`@types/express@${express}`, '@types/node@20', 'express-session@1', '@types/express-session@1'];
    const project = await Project.install(join(folder, `express-${express}`), [
      tarball,
      `express@${express}`,
      'knex@3',
      'pg@8',
      '@opentelemetry/api@1',
      ...types,
      ...compilers,
    ]);
    projects[express] = project;
    await use(project, join(folder, 'express-5/node_modules/typescript'));
  }
  await compileTypes();
  await audit();
} catch (error) {
  console.error(/** @type {Error} */ (error).message);
  process.exitCode = 1;
} finally {
  await database.end().catch(() => {});
  await server.stop();
  await rm(folder, { recursive: true, force: true, maxRetries: 5 });
}

/** @returns {Promise<string>} the tarball */
async function pack() {
  /** @type {{ filename: string, size: number, unpackedSize: number, entryCount: number }[]} */
  const [packed] = JSON.parse(await run('npm', ['pack', '--json', '--pack-destination', folder], { cwd: root }));
  if (!packed) throw new Error('npm pack has packed nothing.');
  const [size, unpackedSize] = [packed.size, packed.unpackedSize].map((bytes) => `${(bytes / 1000).toFixed(0)} kB`);
  console.log(`${packed.filename}: ${size}, unpacked ${unpackedSize} in ${packed.entryCount} files`);
  return join(folder, packed.filename);
}

/**
 * @param {Project} project
 * @param {string} tsc
 */
async function use(project, tsc) {
  const versions = await Promise.all(['express', 'knex', 'pg'].map(async (name) => `${name} ${await project.version(name)}`));
  const title = `installed with ${versions.join(', ')}`;
  await serves('from CommonJS', () => project.runProgram('consumer.cjs', server.url));
  await serves('from ESM', () => project.runProgram('consumer.mjs', server.url));
  for (const file of ['testing.cjs', 'testing.mjs']) await rollsBack(() => project.runProgram(file, server.url));
  for (const file of ['tracing.cjs', 'tracing.mjs']) deepStrictEqual(await project.runProgram(file, server.url), ['transaction']);
  console.log(`ok: ${title}: used from CommonJS and ESM`);

  const files = await Project.programs();
  /** @type {[string, Record<string, unknown>, string][]} */
  const kinds = [
    ['node16, CommonJS', node16, 'commonjs'],
    ['node16, ESM', node16, 'module'],
    ['bundler', bundler, 'module'],
  ];
  for (const [kind, options, type] of kinds) {
    const program = await project.compile({ tsc, files, options, type, emits: true });
    await serves('from TypeScript', () => project.runProgram('consumer.js', server.url, program));
    await rollsBack(() => project.runProgram('testing.js', server.url, program));
    deepStrictEqual(await project.runProgram('tracing.js', server.url, program), ['transaction']);
    console.log(`ok: ${title}: used from TypeScript, ${kind}`);
  }
}

/**
 * @param {string} text
 * @param {() => Promise<unknown>} consume
 */
async function serves(text, consume) {
  deepStrictEqual(await consume(), { status: 201, body: { text } });
  const { rows } = await database.query('SELECT * FROM notes WHERE text = $1', [text]);
  deepStrictEqual(rows, [{ text }]);
  await database.query('DELETE FROM notes');
}

/** @param {() => Promise<unknown>} test */
async function rollsBack(test) {
  deepStrictEqual(await test(), [{ text: 'in a test' }]);
  deepStrictEqual((await database.query('SELECT * FROM notes')).rows, []);
}

async function compileTypes() {
  const { 'two-databases': twoDatabases, ...programs } = typePrograms();
  for (const [compiler, express, options, type] of COMPILATIONS) {
    const tsc = join(folder, 'express-5/node_modules', compiler);
    const project = /** @type {Project} */ (projects[express]);
    const seen = compiler === 'typescript' ? { ...programs, twoDatabases } : programs;
    for (const files of Object.values(seen)) await project.compile({ tsc, files: withTables(files ?? {}, type), options, type });
    const version = await /** @type {Project} */ (projects[5]).version(compiler);
    console.log(
      `ok: types: TypeScript ${version}, ${options['moduleResolution']} (${type}), @types/express ${await project.version('@types/express')}`,
    );
  }
}

/**
 * With Knex's tables registered as most write it. Node's own way for ESM wants the extension.
 *
 * @param {Record<string, string>} files
 * @param {string} type
 */
function withTables(files, type) {
  if (type === 'module') return files;
  return Object.fromEntries(
    Object.entries(files).map(([name, text]) => [name, text.replace("'knex/types/tables.js'", "'knex/types/tables'")]),
  );
}

async function audit() {
  // Its exit code does not tell a finding from a registry that has no such service.
  const { isClean, text } = judgeAudit(await run('npm', ['audit', '--json'], { cwd: root, isLenient: true }));
  console.log(text);
  if (isClean === false) process.exitCode = 1;
}
