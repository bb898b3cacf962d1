import createKnex, { type Knex } from 'knex';
import { TestConnection } from './test-connection';
import type { TestTransactions } from './test-transactions';

interface PgClient {
  readonly config: Knex.Config;
  readonly pool?: { release(connection: unknown): unknown };
  on(event: string, listener: (...values: unknown[]) => void): unknown;
}
type PgClientClass = new (config: Knex.Config) => PgClient;

/**
 * A Knex instance like the given one, with a pool of its own, all of whose connections lead into the transaction of the running test. What
 * is made of it (transactions, sessions, models) works as in production, and knows nothing of that.
 */
export function createTestKnex(knex: Knex, transactions: TestTransactions): Knex {
  const { client: original, userParams } = knex;
  const { connectionPool: _, connection, pool, ...config } = original.config;

  class TestClient extends (original.constructor as PgClientClass) {
    private readonly lent = new WeakSet<TestConnection>();

    async acquireRawConnection(): Promise<TestConnection> {
      const connection = new TestConnection(transactions);
      // Whoever holds it may have forgotten it, and the pool would wait for it without end.
      connection.once('end', () => this.pool?.release(connection));
      return connection;
    }

    async destroyRawConnection(connection: TestConnection): Promise<void> {
      await connection.end();
    }

    /** Knex's own would take another connection for it: of the same transaction. */
    cancelQuery(connection: TestConnection): Promise<void> {
      return connection.cancel();
    }

    /** Each is lent once: Knex gives that of a stream back twice, and another may have borrowed it by then. */
    validateConnection(connection: TestConnection): boolean {
      if (this.lent.has(connection)) return false;
      this.lent.add(connection);
      return true;
    }
  }

  const { afterCreate: _afterCreate, validate: _validate, ...poolConfig } = pool ?? {};
  const testKnex = createKnex({
    ...config,
    client: TestClient as unknown as typeof Knex.Client,
    // What afterCreate does has been done to the connection beneath.
    connection: typeof connection === 'object' ? connection : {},
    // They cost nothing, and the timer for those that are not used would keep the process from ending.
    pool: { ...poolConfig, min: 0, idleTimeoutMillis: 1, reapIntervalMillis: 1 },
  });
  testKnex.userParams = userParams;
  const { client } = testKnex;
  client.config.client = original.config.client;
  client.version ??= original.version;
  for (const event of EVENTS) client.on(event, (...values: unknown[]) => original.emit(event, ...values));
  return testKnex;
}

/** Who listens on the application's Knex hears of its tests. */
const EVENTS = ['start', 'query', 'query-error', 'query-response'];
