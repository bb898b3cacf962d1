import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { accessSync, constants } from 'node:fs';
import { delimiter, join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

/**
 * @typedef {object} PgBouncerOptions
 * @property {string} databaseUrl The server behind it, with user and password; its host is a name or an address. Databases of any name are served.
 * @property {Record<string, string | number>} [settings] Settings of pgbouncer.ini's section `[pgbouncer]`, such as `{ default_pool_size: 2 }`.
 * @property {(line: string) => void} [log] Receives PgBouncer's log, line by line.
 *
 * @typedef {object} PgBouncer
 * @property {string} url `databaseUrl`, through it; any other name of a database will do as well.
 * @property {string} adminUrl Its own console: `SHOW POOLS` and the like, by the simple protocol only.
 * @property {number} port
 * @property {number} pid
 * @property {string} version Such as `1.18.0`.
 * @property {() => Promise<void>} stop Ends open connections and removes its files. Safe to call twice.
 */

/** Where PgBouncer is installed, if it is. Debian puts it where only root's PATH looks. */
export function findPgBouncer() {
  const folders = [...(process.env['PATH'] ?? '').split(delimiter).filter(Boolean), '/usr/sbin', '/usr/local/sbin'];
  return folders.map((folder) => join(folder, 'pgbouncer')).find(isExecutable);
}

/** @param {string} path */
function isExecutable(path) {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

/**
 * Starts a PgBouncer of our own on 127.0.0.1, in transaction mode, in front of a PostgreSQL server.
 *
 * 1. It never outlives this process: a supervisor stops it when this process ends, killed or not.
 * 2. Signals of the terminal do not reach it.
 * 3. As root it runs as the user `postgres` or `nobody`: it refuses to run as root.
 * 4. Rejects if it is not installed; ask {@link findPgBouncer} first.
 *
 * @param {PgBouncerOptions} options
 * @returns {Promise<PgBouncer>}
 */
export async function startPgBouncer({ databaseUrl, settings = {}, log }) {
  const program = findPgBouncer();
  if (program === undefined) throw new Error('PgBouncer is not installed (Debian and Ubuntu: apt-get install pgbouncer).');

  const supervisor = spawn(process.execPath, [fileURLToPath(new URL('./pgbouncer/supervisor.mjs', import.meta.url))], {
    // A session of its own: Ctrl-C in the terminal must not reach it.
    detached: true,
    stdio: ['pipe', 'pipe', 'pipe'],
    env: { ...process.env, NODE_OPTIONS: '' },
  });
  const exited = once(supervisor, 'exit');
  // The pipe breaks when the supervisor dies first; `exited` tells that.
  supervisor.stdin.on('error', () => {});
  supervisor.stdin.write(`${JSON.stringify({ program, databaseUrl, settings })}\n`);

  const logTail = /** @type {string[]} */ ([]);
  createInterface({ input: supervisor.stderr }).on('line', (line) => {
    if (logTail.push(line) > 30) logTail.shift();
    log?.(line);
  });
  const { value } = await createInterface({ input: supervisor.stdout })[Symbol.asyncIterator]().next();
  const answer = value === undefined ? { error: 'its supervisor died.' } : JSON.parse(value);
  if ('error' in answer) {
    await exited;
    throw new Error(`PgBouncer did not start: ${answer.error}\n${logTail.map((line) => `  ${line}`).join('\n')}`);
  }

  // Nothing here keeps the process alive; the closing of stdin's pipe at its end stops PgBouncer.
  const handles = /** @type {{ ref(): void, unref(): void }[]} */ (
    /** @type {unknown[]} */ ([supervisor, supervisor.stdin, supervisor.stdout, supervisor.stderr])
  );
  for (const handle of handles) handle.unref();
  return {
    ...answer,
    async stop() {
      for (const handle of handles) handle.ref();
      supervisor.stdin.end();
      await exited;
    },
  };
}
