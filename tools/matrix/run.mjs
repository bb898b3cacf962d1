import { spawn } from 'node:child_process';

/** @type {Set<import('node:child_process').ChildProcess>} */
const running = new Set();
let isStopped = false;

/**
 * Runs a program in a group of its own, and ends the whole group when it takes too long.
 *
 * @param {string} program
 * @param {string[]} args
 * @param {{ cwd: string, limitMs: number, env?: NodeJS.ProcessEnv }} options
 * @returns {Promise<{ status: number | null, output: string }>}
 */
export async function run(program, args, { cwd, limitMs, env = process.env }) {
  if (isStopped) throw new Error('Stopped.');
  let output = '';
  const child = spawn(program, args, { cwd, env: withoutNpm(env), stdio: ['ignore', 'pipe', 'pipe'], detached: true });
  running.add(child);
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (/** @type {Buffer} */ chunk) => (output += chunk));
  const limit = setTimeout(() => {
    output += `\nIt did not end within ${limitMs / 1000} s.`;
    end(child);
  }, limitMs);
  try {
    const status = await new Promise((resolve, reject) => child.once('error', reject).once('close', resolve));
    if (isStopped) throw new Error('Stopped.');
    return { status, output };
  } finally {
    clearTimeout(limit);
    running.delete(child);
  }
}

/** Ends all that runs; nothing is run any more. */
export function stop() {
  isStopped = true;
  for (const child of running) end(child);
}

/** Its servers stop by themselves: the pipes by which they are held close. @param {import('node:child_process').ChildProcess} child */
function end(child) {
  try {
    if (child.pid) process.kill(-child.pid, 'SIGKILL');
  } catch {
    // It has ended by itself.
  }
}

/** What npm tells its scripts would lead the cell's own npm astray; a server of the person's would be the only version tried. @param {NodeJS.ProcessEnv} env */
function withoutNpm(env) {
  return Object.fromEntries(Object.entries(env).filter(([name]) => !/^(npm_(?!config_)|DATABASE_URL$|NODE_OPTIONS$)/.test(name)));
}
