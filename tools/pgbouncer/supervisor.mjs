/*
 * Owns one PgBouncer: writes its configuration, runs it, and stops it when the pipe on stdin closes. That is the one
 * signal that also comes when the parent is killed by SIGKILL. Started by ../pgbouncer.mjs only.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chown, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { canReach, serverAccount } from '../postgres/account.mjs';

const account = serverAccount(undefined);
/** @type {string | undefined} */
let folder;
/** @type {import('node:child_process').ChildProcess | undefined} */
let pooler;
let stopRequested = false;

// The parent may be gone, and its end of the pipes with it.
process.stdout.on('error', () => {});
process.stderr.on('error', () => {});
for (const signal of /** @type {const} */ (['SIGTERM', 'SIGINT'])) process.on(signal, stopPooler);
process.on('SIGHUP', () => {});

const stdin = createInterface({ input: process.stdin });
stdin.on('close', stopPooler);
stdin.once('line', async (line) => {
  try {
    await run(JSON.parse(line));
  } catch (error) {
    answer({ error: String(error).replace(/^Error: /, '') });
    process.exitCode = 1;
  }
  if (pooler && pooler.exitCode === null && pooler.signalCode === null) await once(pooler, 'exit');
  if (folder) await rm(folder, { recursive: true, force: true });
  process.stdin.destroy();
});

/** @param {{ program: string, databaseUrl: string, settings: Record<string, string | number> }} request */
async function run({ program, databaseUrl, settings }) {
  const database = new URL(databaseUrl);
  const [user, password] = [database.username, database.password].map((part) => decodeURIComponent(part).replaceAll('"', '""'));
  const users = await writeOwn('users.txt', `"${user}" "${password}"\n`);

  for (let attempt = 1; !stopRequested; attempt++) {
    const port = await freePort();
    const all = {
      pool_mode: 'transaction',
      max_client_conn: 1_000,
      ...settings,
      listen_addr: '127.0.0.1',
      listen_port: port,
      unix_socket_dir: '',
      auth_type: 'scram-sha-256',
      auth_file: users,
      admin_users: user,
    };
    const lines = Object.entries(all).map(([name, value]) => `${name} = ${value}`);
    const target = `* = host=${database.hostname.replace(/^\[|\]$/g, '')} port=${database.port || 5432}`;
    const configuration = await writeOwn('pgbouncer.ini', `[databases]\n${target}\n[pgbouncer]\n${lines.join('\n')}\n`);

    const log = await startPooler(program, configuration);
    if (log.includes('process up: PgBouncer')) {
      const through = new URL(databaseUrl);
      through.host = `127.0.0.1:${port}`;
      const admin = new URL(through);
      admin.pathname = '/pgbouncer';
      const version = /PgBouncer ([\d.]+)/.exec(log)?.[1];
      return answer({ url: through.href, adminUrl: admin.href, port, pid: pooler?.pid, version });
    }
    if (!log.includes('in use') || attempt === 5) throw new Error('it ended while starting.');
  }
}

/**
 * @param {string} program
 * @param {string} configuration
 * @returns {Promise<string>} its log, up to the moment at which it is ready or has ended
 */
async function startPooler(program, configuration) {
  const child = spawn(program, [configuration], { ...account.spawn, cwd: '/', env: account.env, stdio: ['ignore', 'ignore', 'pipe'] });
  pooler = child;
  if (stopRequested) stopPooler();

  let log = '';
  return new Promise((resolve, reject) => {
    child.once('error', reject);
    child.once('close', () => resolve(log));
    child.stderr.on('data', (/** @type {Buffer} */ chunk) => {
      process.stderr.write(chunk);
      if (log.includes('process up: PgBouncer')) return;
      log += chunk.toString();
      if (log.includes('process up: PgBouncer')) resolve(log);
    });
  });
}

function stopPooler() {
  stopRequested = true;
  // It has nothing to put in order, and its other signals mean other things from version to version.
  pooler?.kill('SIGKILL');
}

/**
 * Writes a file that only the account reads: there is a password in it.
 *
 * @param {string} name
 * @param {string} text
 */
async function writeOwn(name, text) {
  const { uid, gid } = account.spawn;
  const own = async (/** @type {string} */ path) => {
    if (uid !== undefined && gid !== undefined) await chown(path, uid, gid);
  };
  if (folder === undefined) {
    const parent = [tmpdir(), '/tmp', '/var/tmp'].find((path) => canReach(account, path)) ?? tmpdir();
    folder = await mkdtemp(join(parent, 'express-knex-session-'));
    await own(folder);
  }
  const path = join(folder, name);
  await writeFile(path, text, { mode: 0o600 });
  await own(path);
  return path;
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
