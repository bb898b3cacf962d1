import { randomBytes } from 'node:crypto';
import createKnex, { type Knex } from 'knex';
import { Client } from 'pg';
import { eventually, poolUsage } from './pool';

export interface TestDatabase {
  /** For what is tested. Through PgBouncer in `npm run test:pgbouncer`. */
  url: string;
  /** For the tests' own connections: straight to the server. */
  adminUrl: string;
  /** A new pool on this database; `drop` closes it. */
  knex(config?: Knex.Config): Knex;
  /** A pool of its own for assertions, straight to the server, so that they neither use nor wait for the connections under test. */
  admin: Knex;
  /** The process that serves a connection. Behind PgBouncer the driver does not know it; there, the connection must be the only one in a transaction. */
  backendOf(connection: Client): Promise<number>;
  /** Closes every pool, ends every connection and drops the database. Fails if one of the pools still has connections in use or waiting. */
  drop(options?: { ignoreLeaks?: boolean }): Promise<void>;
}

/** Makes an empty database with a random name, on the server of this run. */
export async function createDatabase(): Promise<TestDatabase> {
  const serverUrl = process.env['TEST_DATABASE_URL'];
  if (!serverUrl) throw new Error('TEST_DATABASE_URL is not set. Run the tests with jest and its config.');
  const name = `test_${randomBytes(8).toString('hex')}`;
  const ownVersion = process.env['TEST_SERVER_VERSION'];
  const isOurs = ownVersion !== undefined;
  // template0: template1 cannot be copied while another worker is connected to it. FILE_COPY takes half the time, but it writes
  // to the disk. (PostgreSQL 14 knows nothing else.)
  const strategy = Number(ownVersion) >= 15 ? ' STRATEGY file_copy' : '';
  await onServer(serverUrl, `CREATE DATABASE ${name} TEMPLATE template0${strategy}`);

  const poolerUrl = process.env['TEST_PGBOUNCER_URL'];
  const url = databaseAt(poolerUrl ?? serverUrl, name);
  const pools: Knex[] = [];
  const connect = (config: Knex.Config = {}): Knex => createKnex({ client: 'pg', connection: url, pool: { min: 0, max: 10 }, ...config });
  const adminUrl = databaseAt(serverUrl, name, ADMIN);
  const admin = connect({ connection: adminUrl, pool: { min: 0, max: 2 } });

  return {
    url,
    adminUrl,
    admin,
    knex(config) {
      const pool = connect(config);
      pools.push(pool);
      return pool;
    },
    async backendOf(connection) {
      if (poolerUrl === undefined) return (connection as Client & { processID: number }).processID;
      const pids = await admin('pg_stat_activity')
        .whereRaw("datname = current_database() AND backend_type = 'client backend' AND xact_start IS NOT NULL")
        .whereNot({ application_name: ADMIN })
        .pluck('pid');
      expect(pids).toHaveLength(1);
      return pids[0];
    },
    async drop({ ignoreLeaks = false } = {}) {
      const leaks: unknown[] = [];
      for (const pool of pools) {
        // Destroyed by the test itself, or by an app's shutdown.
        if (!pool.client.pool) continue;
        const leak = ignoreLeaks ? undefined : await findLeak(pool);
        if (leak) leaks.push(leak);
        const closed = pool.destroy();
        // A pool waits for a leaked connection for ever; dropping the database ends it below.
        if (leak || ignoreLeaks) closed.catch(() => {});
        else await closed;
      }
      await admin.destroy();
      // On our own server it goes with the server: where many files have just been removed, ext4 is slow at making new ones (it was a
      // quarter of the whole run's CPU time).
      const end = `SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '${name}'`;
      await onServer(serverUrl, isOurs ? end : `DROP DATABASE IF EXISTS ${name} WITH (FORCE)`);
      if (leaks.length > 0) throw new AggregateError(leaks, 'A pool still has connections in use, or requests waiting for one.');
    },
  };
}

/** The name by which the server knows the tests' own connections. */
const ADMIN = 'tests';

function databaseAt(serverUrl: string, name: string, applicationName?: string): string {
  const url = new URL(serverUrl);
  url.pathname = `/${name}`;
  if (applicationName) url.searchParams.set('application_name', applicationName);
  return url.href;
}

async function findLeak(pool: Knex): Promise<unknown> {
  try {
    await eventually(() => expect(poolUsage(pool)).toMatchObject({ used: 0, pendingAcquires: 0 }));
    return undefined;
  } catch (error) {
    return error;
  }
}

async function onServer(url: string, sql: string): Promise<void> {
  const client = new Client({ connectionString: url });
  await client.connect();
  try {
    await client.query(sql);
  } finally {
    await client.end();
  }
}
