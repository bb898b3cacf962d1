import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { cp, mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { readGuide, stepsFor } from '../tools/fresh-project/steps';
import { createDatabase, type TestDatabase } from './support/database';
import { listen, post } from './support/http';
import { eventually } from './support/pool';

const root = join(__dirname, '..');
const run = promisify(execFile);

/** Half as much again as it needs: to notice what does not belong there. */
const MOST_BYTES = 180_000;
const MOST_BYTES_UNPACKED = 650_000;

interface Packed {
  filename: string;
  size: number;
  unpackedSize: number;
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
async function createProject(name: string, dependencies: string[]): Promise<string> {
  const project = join(folder, name);
  const installed = join(project, 'node_modules', 'express-knex-session');
  await mkdir(installed, { recursive: true });
  await run('tar', ['-xzf', join(folder, packed.filename), '-C', installed, '--strip-components=1']);
  for (const dependency of dependencies) {
    const path = join(project, 'node_modules', dependency);
    await mkdir(join(path, '..'), { recursive: true });
    await symlink(join(root, 'node_modules', dependency), path);
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

  it('is small', () => {
    expect(packed.size).toBeLessThan(MOST_BYTES);
    expect(packed.unpackedSize).toBeLessThan(MOST_BYTES_UNPACKED);
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

describe('installed in an empty project', () => {
  // `npm run packaging` does so with npm, from CommonJS and TypeScript too, and under Express 4.
  it('serves a request, from ESM', async () => {
    const project = await createProject('esm', ['express', 'knex', 'pg']);
    await useFile(project, 'consumer.mjs');
    expect(await runApp(project, 'consumer.mjs')).toEqual({ status: 201, body: { text: 'from ESM' } });
    expect(await database.admin('notes').where({ text: 'from ESM' })).toHaveLength(1);
  });

  // `npm run fresh` does so with what npm installs, its own PostgreSQL, and with Vitest too.
  it('lets the tests of the README pass, on the server of DATABASE_URL, and its app serve a request', async () => {
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

    await own.admin('accounts').insert([{ name: 'ann' }, { name: 'bob' }]);
    const { port, close } = await listen(() => {});
    await close();
    const server = spawn(process.execPath, ['server.js'], { cwd: project, env: { ...env, PORT: String(port) }, stdio: 'inherit' });
    const transfer = { from: 'ann', to: 'bob', amount: 5 };
    const ended = once(server, 'exit');
    try {
      await eventually(async () => expect((await post(`http://localhost:${port}/transfers`, transfer)).status).toBe(201));
    } finally {
      server.kill();
      await ended;
    }
    expect(await own.admin('entries').pluck('amount')).toEqual([-5, 5]);
    await own.drop();
  });
});
