/*
 * Does what the README's chapter "Testing your app", and the page that it leads to, say word by word, in an empty folder: once with Jest,
 * once with Vitest. Files and commands come out of them; only the package itself is packed from here, in place of the registry's.
 *
 * `npm run fresh`, or `npm run fresh -- Jest`
 */
import { spawn } from 'node:child_process';
import { chmod, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { readGuide, stepsFor } from './fresh-project/steps.js';

/** Tests pass with these, and a person would not be content. */
const COMPLAINTS = ['Jest did not exit', 'A worker process has failed to exit', 'close timed out'];
const STEP_LIMIT_MS = 120_000;

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const runners = process.argv.length > 2 ? process.argv.slice(2) : ['Jest', 'Vitest'];

const folder = await mkdtemp(join(tmpdir(), 'fresh-project-'));
// As root, PostgreSQL is run by another user.
await chmod(folder, 0o755);
let child = /** @type {import('node:child_process').ChildProcess | undefined} */ (undefined);
let isStopped = false;
for (const signal of /** @type {const} */ (['SIGINT', 'SIGTERM', 'SIGHUP'])) {
  process.once(signal, () => {
    isStopped = true;
    stop();
  });
}

try {
  await run(`npm pack --silent --pack-destination '${folder}'`, root);
  const tarball = join(folder, (await readdir(folder)).find((name) => name.endsWith('.tgz')) ?? '');
  const guide = readGuide(root);
  for (const runner of runners) {
    console.log(`\n== ${runner}`);
    // Once more at the end: with the files of the recipes.
    await follow([...stepsFor(guide, runner), { command: 'npm test' }], join(folder, runner.toLowerCase()), tarball);
  }
  console.log('\nThe README can be followed to passing tests.');
} catch (error) {
  console.error(/** @type {Error} */ (error).message);
  process.exitCode = 1;
} finally {
  await rm(folder, { recursive: true, force: true, maxRetries: 5 });
}

/**
 * @param {import('./fresh-project/steps.js').Step[]} steps
 * @param {string} parent where the person stands at the beginning
 * @param {string} tarball
 */
async function follow(steps, parent, tarball) {
  await mkdir(parent);
  let cwd = parent;
  for (const step of steps) {
    if ('file' in step) {
      console.log(`+ ${step.file}`);
      await mkdir(dirname(join(cwd, step.file)), { recursive: true });
      await writeFile(join(cwd, step.file), step.text);
      continue;
    }
    const command = step.command.replace(/^(npm install .*)\bexpress-knex-session\b/, (_, start) => `${start}'${tarball}'`);
    console.log(`$ ${command.replace(tarball, basename(tarball))}`);
    // Each line of the README is typed into the same shell.
    const whereabouts = join(parent, 'whereabouts');
    await run(`${command} && pwd > '${whereabouts}'`, cwd);
    cwd = (await readFile(whereabouts, 'utf8')).trim();
  }
}

/**
 * @param {string} command
 * @param {string} cwd
 */
async function run(command, cwd) {
  // A person at the beginning has no DATABASE_URL, and none of what npm tells its scripts.
  const env = Object.fromEntries(
    Object.entries(process.env).filter(([name]) => !/^(npm_(?!config_)|DATABASE_URL$|NODE_OPTIONS$)/.test(name)),
  );
  // What is left over when something fails goes with the folder.
  env['TMPDIR'] = folder;
  let output = '';
  const status = await new Promise((resolve) => {
    // A group of its own, so that all that it has started can be ended.
    child = spawn('sh', ['-c', command], { cwd, env, stdio: ['ignore', 'pipe', 'pipe'], detached: true });
    for (const stream of [child.stdout, child.stderr]) stream?.on('data', (chunk) => (output += chunk));
    const limit = setTimeout(() => {
      output += `\nIt did not end within ${STEP_LIMIT_MS / 1000} s.`;
      stop();
    }, STEP_LIMIT_MS);
    child.once('close', (code) => {
      clearTimeout(limit);
      resolve(code);
    });
  });
  child = undefined;
  if (isStopped) throw new Error('Stopped.');
  const complaint = COMPLAINTS.find((text) => output.includes(text));
  if (status === 0 && complaint === undefined) return;
  throw new Error(`${output}\n\nFailed${complaint ? ` (${complaint})` : ''}: ${command}`);
}

function stop() {
  try {
    if (child?.pid) process.kill(-child.pid);
  } catch {
    // It has ended by itself.
  }
}
