/**
 * For the tests of an application: each runs in a transaction that is rolled back at its end.
 *
 * @module express-knex-session/testing
 */
import type { Knex } from 'knex';
import { assertKnex } from './assert-knex';
import { ISOLATION_LEVELS, type IsolationLevel } from './beginning';
import { describe } from './describe';
import { aDurationFrom, isDuration } from './resolve-options';
import { createTestKnex } from './testing/test-knex';
import { TestTransactions } from './testing/test-transactions';

export type { IsolationLevel };

/** The options of {@link testDatabase}. */
export interface TestDatabaseOptions {
  /**
   * The isolation level of the transaction that the tests run in. A request that asks for another one gets `ERR_TEST_UNSUPPORTED`.
   *
   * @default the server's
   * @example testDatabase(knex, { isolationLevel: 'serializable' })
   */
  isolationLevel?: IsolationLevel | undefined;

  /**
   * How long a request may wait for another one of the same test that runs no statement, in ms. Past it: `ERR_TEST_BLOCKED`.
   *
   * @default 1000
   * @example testDatabase(knex, { waitTimeout: 3_000 })
   */
  waitTimeout?: number | undefined;
}

/** What {@link testDatabase} returns. Its functions may be passed on by themselves. */
export interface TestDatabase {
  /** For the application, in place of its own, and for the test itself: all that goes through it is rolled back. */
  readonly knex: Knex;

  /**
   * Begins a test; for `beforeEach`. Inside another one (begun in `beforeAll`) it is a savepoint, and keeps what that one has stored.
   *
   * @example
   * beforeEach(database.begin);
   */
  begin(): Promise<void>;

  /**
   * Ends the test, and rolls back all that it and its requests have done; for `afterEach`.
   *
   * @throws SessionError `ERR_TEST_LEFT_OPEN` if a request is still running, or a transaction has been left open; `ERR_TEST_BLOCKED` and
   *   `ERR_TEST_UNSUPPORTED` if a request has met them, whatever it has answered
   * @example
   * afterEach(database.rollback);
   */
  rollback(): Promise<void>;

  /**
   * The same around one test: what it returns begins, runs `work`, and rolls back, also if `work` fails.
   *
   * @example
   * it('stores the transfer', database.inTransaction(async () => {
   *   await request(app).post('/transfers').send(transfer).expect(201);
   * }));
   */
  inTransaction<Arguments extends unknown[], T>(work: (...args: Arguments) => T | Promise<T>): (...args: Arguments) => Promise<T>;
}

/**
 * Tests of an application, each in a transaction that is rolled back at its end.
 *
 * 1. The application, made with `knex` of what this returns, is not changed: what it believes to be transactions are savepoints in one
 *    transaction, on one connection of the given Knex.
 * 2. The test reads and writes through the same `knex`, and sees what its requests have committed.
 * 3. A commit is simulated: deferred constraints and triggers run, `SET LOCAL` and roles are put back. So a commit fails as it would in production.
 * 4. Requests that were sent at once run one after the other, from the first statement of each to its commit.
 *
 * @param knex on the database of the tests, with its schema in place
 * @throws TypeError for a `knex` or an option that is not what it should be
 * @example
 * const database = testDatabase(knex);
 * const app = createApp(database.knex);
 *
 * beforeEach(database.begin);
 * afterEach(database.rollback);
 * afterAll(() => knex.destroy());
 *
 * it('stores the transfer', async () => {
 *   await request(app).post('/transfers').send(transfer).expect(201);
 *   expect(await database.knex('entries')).toHaveLength(2);
 * });
 */
export function testDatabase(knex: Knex, options: TestDatabaseOptions = {}): TestDatabase {
  assertKnex(knex);
  if (knex.isTransaction)
    throw new TypeError('Expected `knex` to be a Knex instance, got a transaction. Pass the instance that it was made of.');
  if (testKnexes.has(knex))
    throw new TypeError('Expected `knex` to be a Knex instance, got that of another testDatabase(). Pass the one that it was made of.');
  const transactions = new TestTransactions(knex, resolve(options));
  const testKnex = createTestKnex(knex, transactions);
  const begin = async (): Promise<void> => {
    // A test of the application's own shutdown has destroyed its pool.
    if (!testKnex.client.pool) testKnex.initialize();
    await transactions.begin();
  };
  const rollback = (): Promise<void> => transactions.rollback();
  testKnexes.add(testKnex);
  return {
    knex: testKnex,
    begin,
    rollback,
    // Without a parameter of its own: Jest would take it for the callback `done`.
    inTransaction: (work) => {
      if (typeof work !== 'function') throw new TypeError(`Expected inTransaction() to be given a function, got ${describe(work)}.`);
      return async (...args) => {
        const test = await transactions.begin({ isWhole: true });
        let result: Awaited<ReturnType<typeof work>>;
        try {
          result = await transactions.run(test, () => work(...args));
        } catch (error) {
          await transactions.rollback(test).catch((why) => {
            // It is the reason, more often than not; runners print it with the error.
            if (error instanceof Error) error.cause ??= why;
          });
          throw error;
        }
        await transactions.rollback(test);
        return result;
      };
    },
  };
}

const testKnexes = new WeakSet<Knex>();

function resolve(options: TestDatabaseOptions) {
  if (typeof options !== 'object' || options === null || Symbol.iterator in options) {
    throw new TypeError(`Expected options to be an object such as { waitTimeout: 3_000 }, got ${describe(options)}.`);
  }
  const { isolationLevel, waitTimeout = 1_000, ...others } = options;
  for (const name of Object.keys(others)) {
    throw new TypeError(`Unknown option \`${name}\`. testDatabase() takes: isolationLevel, waitTimeout.`);
  }
  if (isolationLevel !== undefined && !ISOLATION_LEVELS.includes(isolationLevel)) {
    throw new TypeError(`Expected \`isolationLevel\` to be one of '${ISOLATION_LEVELS.join("', '")}', got ${describe(isolationLevel)}.`);
  }
  if (!isDuration(waitTimeout)) throw new TypeError(`Expected \`waitTimeout\` to be ${aDurationFrom(1)}, got ${describe(waitTimeout)}.`);
  return { isolationLevel, waitTimeout };
}
