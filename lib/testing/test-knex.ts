import createKnex, { type Knex } from 'knex';
import { TestConnection } from './test-connection';
import type { TestTransactions } from './test-transactions';

interface PgClient {
  readonly config: Knex.Config;
  pool?: Pool;
  initializePool(config?: Knex.Config): void;
  on(event: string, listener: (...values: unknown[]) => void): unknown;
}
/** tarn's. */
interface Pool {
  acquire(): { promise: Promise<any> };
  release(connection: unknown): boolean;
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
    override initializePool(poolConfig?: Knex.Config): void {
      super.initializePool(poolConfig);
      if (this.pool) lendEachOnce(this.pool, () => new TestConnection(transactions));
    }

    async acquireRawConnection(): Promise<object> {
      return {};
    }

    async destroyRawConnection(connection: object): Promise<void> {
      if (connection instanceof TestConnection) await connection.end();
    }

    /** Knex's own would take another connection for it: of the same transaction. */
    cancelQuery(connection: TestConnection): Promise<void> {
      return connection.cancel();
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
  // It would wait for the test's connection without end, and without a word.
  const { destroy } = original;
  original.destroy = async (callback?: unknown) => {
    const ended = transactions.abandon();
    await ended.catch(() => {});
    await destroy.call(original, callback);
    await ended;
  };
  client.config.client = original.config.client;
  for (const event of EVENTS) client.on(event, (...values: unknown[]) => original.emit(event, ...values));
  return testKnex;
}

/** Who listens on the application's Knex hears of its tests. */
const EVENTS = ['start', 'query', 'query-error', 'query-response'];

/**
 * Knex gives the connection of a stream back twice, and another may have borrowed it by then. So the pool lends places, and each borrower gets
 * a connection of its own.
 */
function lendEachOnce(pool: Pool, makeConnection: () => TestConnection): void {
  const places = new WeakMap<object, unknown>();
  const acquire = pool.acquire.bind(pool);
  const release = pool.release.bind(pool);
  pool.acquire = () => {
    const pending = acquire();
    pending.promise = pending.promise.then((place: { __knexUid: string }) => {
      const connection = makeConnection();
      connection.__knexUid = place.__knexUid;
      places.set(connection, place);
      // Whoever holds it may have forgotten it, and the pool would wait for it without end.
      connection.once('end', () => pool.release(connection));
      return connection;
    });
    return pending;
  };
  pool.release = (connection) => {
    const place = places.get(connection as object);
    places.delete(connection as object);
    return place !== undefined && release(place);
  };
}
