import { execFile } from 'node:child_process';
import { cp, mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { readGuide, stepsFor } from '../tools/fresh-project/steps';
import { createDatabase, type TestDatabase } from './support/database';

const root = join(__dirname, '..');
const run = promisify(execFile);

interface Packed {
  filename: string;
  files: { path: string }[];
}

let folder: string;
let packed: Packed;
let database: TestDatabase;

beforeAll(async () => {
  database = await createDatabase();
  await database.admin.schema.createTable('notes', (table) => table.text('text'));

  // Packed from a copy: packing builds `dist` anew, which other test files may be using.
  folder = await mkdtemp(join(tmpdir(), 'packaging-test-'));
  const source = join(folder, 'source');
  await mkdir(source);
  const isOfPackage = /^(lib|package\.json|tsconfig.*\.json|LICENSE|.*\.md)$/;
  for (const name of await readdir(root)) {
    if (isOfPackage.test(name)) await cp(join(root, name), join(source, name), { recursive: true });
  }
  await symlink(join(root, 'node_modules'), join(source, 'node_modules'));
  const { stdout } = await run('npm', ['pack', '--json', '--pack-destination', folder], { cwd: source });
  [packed] = JSON.parse(stdout);
}, 60_000);

afterAll(async () => {
  await database.drop();
  await rm(folder, { recursive: true, force: true });
});

afterEach(() => database.admin('notes').del());

/** An empty project with the tarball in it. What else it installed is linked: npm would need the network for it. */
async function createProject(name: string, dependencies: string[], links: Record<string, string> = {}): Promise<string> {
  const project = join(folder, name);
  const installed = join(project, 'node_modules', 'express-knex-session');
  await mkdir(installed, { recursive: true });
  await run('tar', ['-xzf', join(folder, packed.filename), '-C', installed, '--strip-components=1']);
  for (const dependency of dependencies) {
    const path = join(project, 'node_modules', dependency);
    await mkdir(join(path, '..'), { recursive: true });
    await symlink(join(root, 'node_modules', links[dependency] ?? dependency), path);
  }
  return project;
}

async function useFile(project: string, file: string): Promise<void> {
  await cp(join(__dirname, 'packaging', file), join(project, file));
}

async function runApp(project: string, file: string): Promise<unknown> {
  const env = { ...process.env, NODE_OPTIONS: '', DATABASE_URL: database.url };
  const { stdout, stderr } = await run(process.execPath, [file], { cwd: project, env });
  expect(stderr).toBe('');
  return JSON.parse(stdout);
}

describe('the tarball', () => {
  it('holds the build and the documents, and nothing else', () => {
    const files = packed.files.map(({ path }) => path);
    const others = files.filter((path) => !/^dist\/[\w/-]+\.(js|d\.ts)$/.test(path)).sort();
    expect(others).toEqual(['CHANGELOG.md', 'LICENSE', 'README.md', 'package.json']);
    expect(files).toEqual(expect.arrayContaining(['dist/index.js', 'dist/index.d.ts', 'dist/testing.js', 'dist/testing.d.ts']));
  });

  it('brings no dependencies', async () => {
    const manifest = JSON.parse(await readFile(join(root, 'package.json'), 'utf8'));
    expect(manifest.dependencies).toBeUndefined();
    expect(manifest.scripts).not.toHaveProperty('postinstall');
  });

  it('keeps the documentation of options in its types', async () => {
    const project = await createProject('documentation', []);
    expect(await readFile(join(project, 'node_modules/express-knex-session/dist/options.d.ts'), 'utf8')).toContain("@default 'head'");
  });
});

describe('installed in an empty JavaScript project', () => {
  it.each([
    ['express', 'consumer.cjs', 'from CommonJS'],
    ['express', 'consumer.mjs', 'from ESM'],
    ['express4', 'consumer.cjs', 'from CommonJS'],
    ['express4', 'consumer.mjs', 'from ESM'],
  ])('serves a request with %s from %s', async (express, file, text) => {
    const project = await createProject(`${express}-${file}`, ['express', 'knex', 'pg'], { express });
    await useFile(project, file);
    expect(await runApp(project, file)).toEqual({ status: 201, body: { text } });
    expect(await database.admin('notes').where({ text })).toHaveLength(1);
  });
});

describe("installed beside a runner of tests, 'express-knex-session/testing'", () => {
  it.each(['testing.cjs', 'testing.mjs'])('rolls back what a test has stored, and throws the errors of the package: %s', async (file) => {
    const project = await createProject(file, ['express', 'knex', 'pg']);
    await useFile(project, file);
    expect(await runApp(project, file)).toEqual([{ text: 'in a test' }]);
    expect(await database.admin('notes')).toEqual([]);
  });

  // `npm run fresh` does so with what npm installs, its own PostgreSQL, and with Vitest too.
  it('lets the tests of the README pass, on the server of DATABASE_URL', async () => {
    const project = await createProject('readme', ['express', 'knex', 'pg', 'jest', 'supertest']);
    const files = stepsFor(readGuide(root), 'Jest').flatMap((step) => ('file' in step ? [step] : []));
    for (const { file, text } of files) {
      await mkdir(join(project, file, '..'), { recursive: true });
      await writeFile(join(project, file), text);
    }
    const own = await createDatabase();
    const env = { ...process.env, NODE_OPTIONS: '', DATABASE_URL: own.url };

    const { stderr } = await run(process.execPath, [join(root, 'node_modules/jest/bin/jest.js'), '--maxWorkers=1'], { cwd: project, env });

    expect(stderr).not.toContain('did not exit');
    const passed = [...stderr.matchAll(/^PASS (\S+)/gm)].map(([, file]) => file);
    expect(passed.sort()).toEqual(
      files
        .map(({ file }) => file)
        .filter((file) => file.endsWith('.test.js'))
        .sort(),
    );
    expect(passed.length).toBeGreaterThan(3);
    expect(await own.admin('accounts')).toEqual([]);
    await own.drop();
  });
});

describe('installed in an empty TypeScript project', () => {
  const types = ['@types/express', '@types/node'];
  const strict = { strict: true, exactOptionalPropertyTypes: true, noUncheckedIndexedAccess: true, target: 'es2022', types: ['node'] };

  async function createTypedProject(name: string, options: object, manifest: object, links: Record<string, string>): Promise<string> {
    const project = await createProject(name, ['express', 'knex', 'pg', 'express-session', '@types/express-session', ...types], links);
    await writeFile(join(project, 'package.json'), JSON.stringify(manifest));
    await writeFile(join(project, 'tsconfig.json'), JSON.stringify({ compilerOptions: { ...strict, ...options } }));
    return project;
  }

  /** TypeScript's complaints, one for each line; none is ''. */
  async function compile(project: string): Promise<string> {
    const tsc = join(root, 'node_modules', 'typescript', 'bin', 'tsc');
    return run(process.execPath, [tsc, '--pretty', 'false'], { cwd: project }).then(
      ({ stdout }) => stdout,
      (error) => error.stdout,
    );
  }

  const node16 = { module: 'node16', moduleResolution: 'node16' };
  const bundler = { module: 'esnext', moduleResolution: 'bundler' };
  const express4 = { express: 'express4', '@types/express': '@types/express4' };
  it.each([
    ['node16, CommonJS', node16, { type: 'commonjs' }, {}],
    ['node16, ESM', node16, { type: 'module' }, {}],
    ['bundler', bundler, { type: 'module' }, {}],
    ['node16, with Express 4 and its types', node16, { type: 'commonjs' }, express4],
  ])('types req.session with one import, and tests, and runs: %s', async (name, options, manifest, links) => {
    const project = await createTypedProject(name, options, manifest, links);
    await useFile(project, 'consumer.ts');
    await useFile(project, 'testing.ts');
    expect(await compile(project)).toBe('');
    expect(await runApp(project, 'consumer.js')).toEqual({ status: 201, body: { text: 'from TypeScript' } });
    expect(await runApp(project, 'testing.js')).toEqual([{ text: 'from TypeScript' }, { text: 'in a test' }]);
    expect(await database.admin('notes')).toEqual([{ text: 'from TypeScript' }]);
  });

  it('lets express-session keep req.session, and types the registered property', async () => {
    const project = await createTypedProject('with-express-session', node16, { type: 'commonjs' }, {});
    await useFile(project, 'with-express-session.ts');
    expect(await compile(project)).toBe('');
  });
});
