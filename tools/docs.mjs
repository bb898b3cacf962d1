/*
 * Makes the API reference, docs/api/, of the doc comments in lib/.
 *
 * `npm run docs`, or `npm run docs -- --check`, which only says whether the one that is there is up to date. Its tools are installed at the
 * first use (48 MB, in tools/docs): `npm ci` of the project does without.
 */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { cp, mkdtemp, readdir, readFile, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const tools = join(root, 'tools/docs');
const target = join(root, 'docs/api');

const folder = await mkdtemp(join(tmpdir(), 'api-reference-'));
try {
  if (!(await isInstalled())) run('npm', ['ci', '--no-audit', '--no-fund', '--loglevel=error'], tools);
  run(process.execPath, [join(tools, 'node_modules/typedoc/bin/typedoc'), '--out', folder], tools);
  if (process.argv.includes('--check')) await check();
  else {
    await rm(target, { recursive: true, force: true });
    await cp(folder, target, { recursive: true });
  }
} finally {
  await rm(folder, { recursive: true, force: true });
}

async function isInstalled() {
  const installed = join(tools, 'node_modules/.package-lock.json');
  if (!existsSync(installed)) return false;
  const [lock, done] = await Promise.all([join(tools, 'package-lock.json'), installed].map((file) => stat(file)));
  return /** @type {import('node:fs').Stats} */ (done).mtimeMs >= /** @type {import('node:fs').Stats} */ (lock).mtimeMs;
}

async function check() {
  const [made, found] = await Promise.all([pagesIn(folder), pagesIn(target)]);
  const differing = [...new Set([...made.keys(), ...found.keys()])].filter((page) => made.get(page) !== found.get(page));
  if (differing.length === 0) return;
  console.error(`docs/api is not that of the doc comments in lib/: ${differing.join(', ')}. Run: npm run docs`);
  process.exitCode = 1;
}

/**
 * @param {string} path
 * @returns {Promise<Map<string, string>>}
 */
async function pagesIn(path) {
  const entries = existsSync(path) ? await readdir(path, { recursive: true, withFileTypes: true }) : [];
  const files = entries.filter((entry) => entry.isFile()).map((entry) => join(entry.parentPath, entry.name));
  return new Map(
    await Promise.all(files.map(async (file) => /** @type {const} */ ([file.slice(path.length + 1), await readFile(file, 'utf8')]))),
  );
}

/**
 * @param {string} command
 * @param {string[]} args
 * @param {string} cwd
 */
function run(command, args, cwd) {
  const { status, error } = spawnSync(command, args, { cwd, stdio: 'inherit' });
  if (status !== 0) throw error ?? new Error(`${command} has failed.`);
}
