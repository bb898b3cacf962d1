/*
 * Owns one PostgreSQL server: prepares its folder, runs it, and stops it when the pipe on stdin closes. That is the one
 * signal that also comes when the parent is killed by SIGKILL. Started by ../postgres.mjs only.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { rm } from 'node:fs/promises';
import { createServer } from 'node:net';
import { createInterface } from 'node:readline';
import { serverAccount } from './account.mjs';
import { prepareBinaries } from './binaries.mjs';
import { initialiseData, prepareDataDir, readPassword, waitForOtherServer } from './data.mjs';
import { KnownError } from './errors.mjs';

const cleanups = /** @type {(() => Promise<unknown>)[]} */ ([]);
let stopRequested = false;
/** @type {Promise<void> | undefined} */
let restarting;
/** @type {import('node:child_process').ChildProcess | undefined} */
let server;

// The parent may be gone, and its end of the pipes with it.
process.stdout.on('error', () => {});
process.stderr.on('error', () => {});
for (const signal of /** @type {const} */ (['SIGTERM', 'SIGINT'])) process.on(signal, stopServer);
process.on('SIGHUP', () => {});

const stdin = createInterface({ input: process.stdin });
stdin.on('close', stopServer);
stdin.once('line', async (line) => {
  try {
    await run(JSON.parse(line));
  } catch (error) {
    answer(describe(error));
    process.exitCode = 1;
  }
  await stopped();
  for (const cleanup of cleanups.reverse()) await cleanup().catch((error) => console.error(error));
  process.stdin.destroy();
});

/** @param {{ dataDir?: string, port?: number, settings?: Record<string, string | number> }} request */
async function run({ dataDir: wanted, port: wantedPort, settings = {} }) {
  const isTemporary = wanted === undefined;
  const { dataDir, temporaryFolder, notice } = await prepareDataDir(wanted, serverAccount(wanted));
  const account = serverAccount(dataDir);
  cleanups.push(() => rm(temporaryFolder, { recursive: true, force: true }));

  const binaries = await prepareBinaries(account, temporaryFolder);
  if (!isTemporary) await waitForOtherServer(dataDir);
  await initialiseData(binaries, dataDir, account);

  const attempts = wantedPort === undefined ? 5 : 1;
  for (let attempt = 1; !stopRequested; attempt++) {
    const port = wantedPort ?? (await freePort());
    const log = await startServer(binaries.postgres, dataDir, port, settings, account);
    if (log === undefined) {
      const url = `postgres://postgres:${await readPassword(dataDir)}@127.0.0.1:${port}/postgres`;
      answer({ url, port, dataDir, pid: server?.pid, notice });
      // SIGQUIT is no clean shutdown, and the fastest one.
      if (isTemporary) stopSignal = 'SIGQUIT';
      stdin.on('line', (line) => {
        restarting = restart(JSON.parse(line).restart, () => startServer(binaries.postgres, dataDir, port, settings, account)).catch(
          (error) => answer(describe(error)),
        );
      });
      return;
    }
    const taken = log.includes('could not bind');
    if (taken && attempt < attempts) continue;
    if (taken) throw new KnownError(`port ${port} on 127.0.0.1 is taken. Choose another one, or none for a free one.`);
    throw new Error('the server ended while starting.');
  }
}

/**
 * @param {'immediate' | 'fast'} mode
 * @param {() => ReturnType<typeof startServer>} start
 */
async function restart(mode, start) {
  const stopping = server && once(server, 'exit');
  server?.kill(mode === 'fast' ? 'SIGINT' : 'SIGQUIT');
  await stopping;
  const log = stopRequested ? 'it was to stop.' : await start();
  answer(log === undefined ? { pid: server?.pid } : { error: 'the server ended while starting.' });
}

/**
 * @param {string} postgres
 * @param {string} dataDir
 * @param {number} port
 * @param {Record<string, string | number>} settings
 * @param {import('./account.mjs').Account} account
 * @returns {Promise<string | undefined>} undefined when the server is ready, its log when it ended instead
 */
async function startServer(postgres, dataDir, port, settings, account) {
  const all = { listen_addresses: '127.0.0.1', unix_socket_directories: '', logging_collector: 'off', lc_messages: 'C', ...settings };
  const flags = Object.entries(all).flatMap(([name, value]) => ['-c', `${name}=${value}`]);
  const child = spawn(postgres, ['-D', dataDir, '-p', String(port), ...flags], {
    ...account.spawn,
    cwd: dataDir,
    env: account.env,
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  server = child;
  if (stopRequested) child.kill(stopSignal);

  let log = '';
  return new Promise((resolve, reject) => {
    let isReady = false;
    child.once('error', reject);
    child.once('close', () => resolve(log));
    child.stderr.on('data', (/** @type {Buffer} */ chunk) => {
      process.stderr.write(chunk);
      if (isReady) return;
      log += chunk.toString();
      isReady = log.includes('database system is ready to accept connections');
      if (isReady) resolve(undefined);
    });
  });
}

/** @type {NodeJS.Signals} */
let stopSignal = 'SIGINT'; // "fast": ends connections, then a clean shutdown

function stopServer() {
  stopRequested = true;
  server?.kill(stopSignal);
}

async function stopped() {
  while (server && server.exitCode === null && server.signalCode === null) {
    await once(server, 'exit');
    await restarting;
  }
}

/** @param {unknown} error */
function describe(error) {
  const { code, path } = /** @type {NodeJS.ErrnoException} */ (error);
  if (error instanceof KnownError) return { error: error.message, known: true };
  if (code !== 'EACCES' && code !== 'EPERM') return { error: String(error).replace(/^Error: /, ''), known: false };
  return { error: `no permission for ${path}. Was it made by another user, root perhaps? Start as that user, or remove it.`, known: true };
}

/** @param {object} message */
function answer(message) {
  process.stdout.write(`${JSON.stringify(message)}\n`);
}

/** @returns {Promise<number>} */
async function freePort() {
  const probe = createServer().listen(0, '127.0.0.1');
  await once(probe, 'listening');
  const { port } = /** @type {import('node:net').AddressInfo} */ (probe.address());
  probe.close();
  await once(probe, 'close');
  return port;
}
