import { execFileSync, spawnSync } from 'node:child_process';
import { statSync } from 'node:fs';
import { KnownError } from './errors.mjs';

/**
 * Who runs the server. PostgreSQL refuses to run as root; no user is created for it.
 *
 * @typedef {object} Account
 * @property {{ uid?: number, gid?: number }} spawn
 * @property {NodeJS.ProcessEnv} env
 */

/**
 * @param {string | undefined} dataDir
 * @returns {Account}
 */
export function serverAccount(dataDir) {
  // PG* and locale variables of the person's shell must not change the server.
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(PG|LC_|LANG|LD_)/.test(name)));
  env['LC_ALL'] = 'C';
  if (process.getuid?.() !== 0) return { spawn: {}, env };

  const ids = ownerOf(dataDir) ?? idsOf('postgres') ?? idsOf('nobody');
  if (ids === undefined) throw new KnownError('root cannot run PostgreSQL, and there is no user `postgres` or `nobody` to run it as.');
  return { spawn: ids, env: { ...env, HOME: '/' } };
}

/**
 * Whether the server's account can go into this folder; a clone in /root (mode 700) is out of its reach.
 *
 * @param {Account} account
 * @param {string} path
 */
export function canReach(account, path) {
  if (account.spawn.uid === undefined) return true;
  return spawnSync('test', ['-x', path], { ...account.spawn, cwd: '/' }).status === 0;
}

/** @param {string | undefined} path */
function ownerOf(path) {
  const stats = path === undefined ? undefined : statSync(path, { throwIfNoEntry: false });
  return stats && stats.uid !== 0 ? { uid: stats.uid, gid: stats.gid } : undefined;
}

/** @param {string} user */
function idsOf(user) {
  try {
    const [uid, gid] = ['-u', '-g'].map((flag) => Number(execFileSync('id', [flag, user], { stdio: ['ignore', 'pipe', 'ignore'] })));
    return uid && gid ? { uid, gid } : undefined;
  } catch {
    return undefined;
  }
}
