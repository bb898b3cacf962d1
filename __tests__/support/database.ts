import { randomBytes } from 'node:crypto';
import createKnex, { type Knex } from 'knex';
import { Client } from 'pg';
import { eventually, poolUsage } from './pool';

export interface TestDatabase {
  url: string;
  /** A new pool on this database; `drop` closes it. */
  knex(config?: Knex.Config): Knex;
  /** A pool of its own for assertions, so that they neither use nor wait for the connections under test. */
  admin: Knex;
  /** Closes every pool and drops the database. Fails if one of the pools still has connections in use or waiting. */
  drop(options?: { ignoreLeaks?: boolean }): Promise<void>;
}

/** Makes an empty database with a random name, on the server of this run. */
export async function createDatabase(): Promise<TestDatabase> {
  const serverUrl = process.env['TEST_DATABASE_URL'];
  if (!serverUrl) throw new Error('TEST_DATABASE_URL is not set. Run the tests with jest and its config.');
  const name = `test_${randomBytes(8).toString('hex')}`;
  // template0: template1 cannot be copied while another worker is connected to it.
  await onServer(serverUrl, `CREATE DATABASE ${name} TEMPLATE template0`);

  const url = new URL(serverUrl);
  url.pathname = `/${name}`;
  const pools: Knex[] = [];
  const connect = (config: Knex.Config = {}): Knex =>
    createKnex({ client: 'pg', connection: url.href, pool: { min: 0, max: 10 }, ...config });
  const admin = connect({ pool: { min: 0, max: 2 } });

  return {
    url: url.href,
    admin,
    knex(config) {
      const pool = connect(config);
      pools.push(pool);
      return pool;
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
      await onServer(serverUrl, `DROP DATABASE IF EXISTS ${name} WITH (FORCE)`);
      if (leaks.length > 0) throw new AggregateError(leaks, 'A pool still has connections in use, or requests waiting for one.');
    },
  };
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
