import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { statSync } from 'node:fs';
import { chmod, chown, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { type AddressInfo, createServer } from 'node:net';
import { dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { Client } from 'pg';
import { eventually } from './pool';

export interface Replica {
  /** The same database, on the replica. */
  urlOf(databaseUrl: string): string;
  /** Waits until the replica has all that the primary has now. */
  caughtUp(): Promise<void>;
  stop(): Promise<void>;
}

/**
 * Starts a hot standby that streams from a server of ours on this machine. The package with its binaries has no pg_basebackup, so the copy is
 * made as PostgreSQL's manual says under "Making a Base Backup Using the Low Level API".
 *
 * @param primaryUrl of a superuser
 */
export async function startReplica(primaryUrl: string): Promise<Replica> {
  const primary = new Client(primaryUrl);
  await primary.connect();
  const { rows } = await primary.query(
    "SELECT setting AS bin, current_setting('data_directory') AS data FROM pg_config WHERE name = 'BINDIR'",
  );
  const { bin, data } = rows[0] as { bin: string; data: string };
  // Next to the primary's: there the account that PostgreSQL runs as can go, be it ours or, for root, another.
  const folder = await mkdtemp(join(dirname(dirname(data)), 'express-knex-session-replica-'));
  await chmod(folder, 0o711);
  const copy = join(folder, 'data');

  await primary.query("SELECT pg_backup_start('replica', true)");
  await promisify(execFile)('cp', ['-a', data, copy]);
  const backup = await primary.query('SELECT labelfile FROM pg_backup_stop(false)');
  await rm(join(copy, 'postmaster.pid'));
  const { uid, gid } = statSync(data);
  for (const [name, text] of [
    ['backup_label', backup.rows[0].labelfile],
    ['standby.signal', ''],
  ]) {
    await writeFile(join(copy, name), text);
    await chown(join(copy, name), uid, gid);
  }

  const { hostname, port: primaryPort, username, password } = new URL(primaryUrl);
  const port = await freePort();
  const settings = {
    listen_addresses: '127.0.0.1',
    unix_socket_directories: '',
    fsync: 'off',
    primary_conninfo: `host=${hostname} port=${primaryPort} user=${username} password=${password}`,
  };
  const flags = Object.entries(settings).flatMap(([name, value]) => ['-c', `${name}=${value}`]);
  // The shell stops it when the pipe closes, which also happens when this process is killed.
  const server = spawn(
    'sh',
    ['-c', '"$@" & read -r _; kill -QUIT $!; wait', 'sh', join(bin, 'postgres'), '-D', copy, '-p', `${port}`, ...flags],
    {
      ...(process.getuid?.() === 0 && { uid, gid }),
      cwd: '/',
      env: { PATH: process.env['PATH'], LC_ALL: 'C' },
      stdio: ['pipe', 'ignore', 'pipe'],
    },
  );
  const exited = once(server, 'exit');
  let log = '';
  server.stderr.setEncoding('utf8').on('data', (lines: string) => {
    log += lines;
  });

  const replica: Replica = {
    urlOf(databaseUrl) {
      const url = new URL(databaseUrl);
      url.port = `${port}`;
      return url.href;
    },
    async caughtUp() {
      const { rows } = await primary.query('SELECT pg_current_wal_lsn() AS lsn');
      const standby = new Client(replica.urlOf(primaryUrl));
      await standby.connect();
      try {
        await eventually(async () => {
          const answer = await standby.query('SELECT pg_last_wal_replay_lsn() >= $1 AS is_there', [rows[0].lsn]);
          expect(answer.rows).toEqual([{ is_there: true }]);
        });
      } finally {
        await standby.end();
      }
    },
    async stop() {
      await primary.end();
      server.stdin.end();
      await exited;
      await rm(folder, { recursive: true, force: true });
    },
  };
  try {
    const ready = eventually(() => expect(log).toContain('ready to accept read-only connections'), 15_000);
    await Promise.race([ready, exited.then(() => Promise.reject(new Error('It has ended.')))]);
    await replica.caughtUp();
  } catch (error) {
    await replica.stop();
    throw new Error(`The replica did not start:\n${log}`, { cause: error });
  }
  return replica;
}

async function freePort(): Promise<number> {
  const probe = createServer().listen(0, '127.0.0.1');
  await once(probe, 'listening');
  const { port } = probe.address() as AddressInfo;
  probe.close();
  await once(probe, 'close');
  return port;
}
