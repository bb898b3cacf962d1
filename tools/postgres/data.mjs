import { execFile } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { chmod, chown, lstat, mkdir, mkdtemp, readdir, readFile, rename, rm, unlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { promisify } from 'node:util';
import { canReach } from './account.mjs';
import { KnownError } from './errors.mjs';

/** @typedef {import('./account.mjs').Account} Account */

/**
 * Chooses the folder of the data, and makes a temporary one for what does not outlive this start.
 *
 * @param {string | undefined} wanted
 * @param {Account} account
 * @returns {Promise<{ dataDir: string, temporaryFolder: string, notice?: string }>}
 */
export async function prepareDataDir(wanted, account) {
  const temporary = [tmpdir(), '/tmp', '/var/tmp'].find((path) => existsSync(path) && canReach(account, path));
  if (temporary === undefined) throw new KnownError(`the server cannot use ${tmpdir()}. Set TMPDIR to a folder that all may enter.`);
  const temporaryFolder = await mkdtemp(join(temporary, 'express-knex-session-'));
  await chmod(temporaryFolder, 0o711);
  if (wanted === undefined) return { dataDir: join(temporaryFolder, 'data'), temporaryFolder };

  await mkdir(dirname(wanted), { recursive: true });
  if (canReach(account, dirname(wanted))) return { dataDir: wanted, temporaryFolder };

  const folder = await privateFolder(wanted);
  const notice = `The database is kept in ${folder}: root cannot run PostgreSQL, and no other user can enter ${dirname(wanted)}.`;
  return { dataDir: join(folder, 'data'), temporaryFolder, notice };
}

/**
 * A folder that survives a reboot and is found again by name. In a folder of all, somebody else could have made it first.
 *
 * @param {string} name
 */
async function privateFolder(name) {
  const parent = existsSync('/var/tmp') ? '/var/tmp' : tmpdir();
  const folder = join(parent, `express-knex-session-${createHash('sha256').update(name).digest('hex').slice(0, 16)}`);
  await mkdir(folder, { mode: 0o711 }).catch((error) => {
    if (error.code !== 'EEXIST') throw error;
  });
  const stats = await lstat(folder);
  if (!stats.isDirectory() || stats.uid !== process.getuid?.()) {
    throw new KnownError(`${folder} belongs to somebody else. Remove it, or move this project to a folder that all may enter.`);
  }
  return folder;
}

/**
 * Makes a new cluster, unless there is one. It is made aside and renamed: a start that is killed half-way leaves no half cluster.
 *
 * @param {{ initdb: string }} binaries
 * @param {string} dataDir
 * @param {Account} account
 */
export async function initialiseData({ initdb }, dataDir, account) {
  if (existsSync(join(dataDir, 'PG_VERSION'))) return;
  if (existsSync(dataDir) && (await readdir(dataDir)).length > 0) {
    throw new KnownError(`${dataDir} holds something that is no PostgreSQL database. Empty it, or choose another folder.`);
  }

  const fresh = `${dataDir}.new`;
  await rm(fresh, { recursive: true, force: true });
  await mkdir(fresh, { mode: 0o700 });
  const { uid, gid } = account.spawn;
  if (uid !== undefined && gid !== undefined) await chown(fresh, uid, gid);

  const password = randomBytes(16).toString('hex');
  const passwordFile = `${dataDir}.password`;
  await writeFile(passwordFile, password, { mode: 0o600 });
  if (uid !== undefined && gid !== undefined) await chown(passwordFile, uid, gid);
  try {
    const flags = [
      '--username=postgres',
      `--pwfile=${passwordFile}`,
      '--auth=scram-sha-256',
      '--encoding=UTF8',
      '--no-locale',
      '--no-sync',
    ];
    const run = (/** @type {string[]} */ args) => promisify(execFile)(initdb, args, { ...account.spawn, cwd: fresh, env: account.env });
    // The password is random and long, so iterations add nothing but time to every connection. PostgreSQL 16 is the first to count them.
    const version = Number((await run(['--version'])).stdout.match(/ (\d+)/)?.[1]);
    await run([...flags, ...(version >= 16 ? ['--set=scram_iterations=1'] : []), `--pgdata=${fresh}`]);
    await rename(passwordFile, join(fresh, passwordName));
    await rename(fresh, dataDir);
  } finally {
    await rm(passwordFile, { force: true });
    await rm(fresh, { recursive: true, force: true });
  }
}

const passwordName = 'password.txt';

/** @param {string} dataDir */
export function readPassword(dataDir) {
  return readFile(join(dataDir, passwordName), 'utf8');
}

/**
 * Sees to it that no other server uses this folder: waits for one that is stopping (its app was just killed), refuses
 * when one runs, and removes the lock of one that is dead.
 *
 * @param {string} dataDir
 */
export async function waitForOtherServer(dataDir) {
  const lock = join(dataDir, 'postmaster.pid');
  for (let attempt = 0; ; attempt++) {
    const [pid, , , port] = (await readFile(lock, 'utf8').catch(() => '')).split('\n');
    if (!pid) return;
    const owner = processNamed(Number(pid));
    // PostgreSQL removes the lock of a dead process itself, but not if another process got its id, which is usual in containers.
    if (owner === 'other') await unlink(lock).catch(() => {});
    if (owner !== 'postgres') return;
    if (attempt === 30) {
      throw new KnownError(
        `another PostgreSQL (process ${pid}, port ${port}) uses ${dataDir}. Stop what started it, or that process (kill -INT ${pid}), and start again.`,
      );
    }
    await delay(100);
  }
}

/**
 * @param {number} pid
 * @returns {'none' | 'postgres' | 'other'}
 */
function processNamed(pid) {
  try {
    process.kill(pid, 0);
  } catch (error) {
    if (/** @type {NodeJS.ErrnoException} */ (error).code === 'ESRCH') return 'none';
  }
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes('postgres') ? 'postgres' : 'other';
  } catch {
    // No /proc on this system: better refuse once too often than run two servers on one folder.
    return existsSync('/proc/self/cmdline') ? 'none' : 'postgres';
  }
}
