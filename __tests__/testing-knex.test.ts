import { once } from 'node:events';
import { PassThrough } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { withSession } from 'express-knex-session';
import { testDatabase } from 'express-knex-session/testing';
import type { Knex } from 'knex';
import { Model } from 'objection';
import { Query } from 'pg';
import QueryStream from 'pg-query-stream';
import { comparable, insert, Ledger, UNCHANGED } from './support/knex';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = Ledger.forTests();

class Person extends Model {
  static override tableName = 'people';
}

const MANY = 'select i from generate_series(1, 1000) i';
/** Fails at its 600th row, when some have come. */
const FAILS_LATE = 'select 1 / (600 - i) from generate_series(1, 1000) i';
const failure = new RangeError('no');

/** What a promise became, for uses that go on after a failure. */
const settled = async (promise: PromiseLike<unknown>) => (await Promise.allSettled([promise]))[0];

/** Reads rows to the end, to an error, or until there are enough. */
async function read(stream: AsyncIterable<unknown>, enough = Number.POSITIVE_INFINITY): Promise<unknown> {
  const rows: unknown[] = [];
  let error: unknown;
  try {
    for await (const row of stream) if (rows.push(row) >= enough) break;
  } catch (thrown) {
    error = thrown;
  }
  return { rows: rows.length, first: rows[0], error };
}

/** Something that one does with a Knex instance; it says what it saw. */
type Use = (knex: Knex) => unknown;

/** On a connection of the pool, as the driver gives it. */
const onConnection =
  (work: (connection: any) => unknown): Use =>
  async (knex) => {
    const connection = await knex.client.acquireConnection();
    try {
      return await work(connection);
    } finally {
      await knex.client.releaseConnection(connection);
    }
  };

/** Streams are to do the same wherever they are opened. */
const streams = (open: (knex: Knex, work: Use) => unknown): Record<string, Use> => ({
  'for await': (knex) => open(knex, (db) => read(db('people').orderBy('id').stream())),
  'for await that breaks early': (knex) =>
    open(knex, async (db) => [await read(db.raw(MANY).stream({ highWaterMark: 2 }), 3), await insert(db, 'x')]),
  'a pipe': (knex) => open(knex, (db) => read(db.raw(MANY).pipe(new PassThrough({ objectMode: true })))),
  'a handler': (knex) => open(knex, (db) => db('people').stream((stream) => void stream.resume())),
  'a stream that is destroyed early': (knex) =>
    open(knex, async (db) => {
      const stream = db.raw(MANY).stream({ highWaterMark: 2 });
      await once(stream, 'data');
      stream.destroy();
      await once(stream, 'close');
      return insert(db, 'x');
    }),
  'a stream that fails late': (knex) => open(knex, (db) => read(db.raw(FAILS_LATE).stream())),
  'a stream that is refused': (knex) => open(knex, (db) => read(db('nothing').stream())),
  'a pipe whose end fails': (knex) =>
    open(knex, async (db) => {
      const sink = new PassThrough({ objectMode: true });
      const done = settled(pipeline(db.raw(MANY).stream({ highWaterMark: 2 }), sink));
      sink.destroy(failure);
      return [await done, await insert(db, 'x')];
    }),
});

const uses: Record<string, Record<string, Use>> = {
  builder: {
    select: (knex) => knex('people').orderBy('id'),
    first: (knex) => knex('people').where({ name: 'Ann' }).first(),
    'a write that returns': (knex) => insert(knex, 'x').returning(['id', 'name']),
    'counts of update and delete': async (knex) => [
      await knex('people').update({ balance: 0 }),
      await knex('people').where({ id: 3 }).del(),
    ],
    upsert: (knex) => insert(knex, 'Ann').onConflict('name').merge({ balance: 9 }).returning('*'),
    'an error, and another statement': async (knex) => [
      await settled(insert(knex, 'Ann')),
      await insert(knex, 'x'),
      await knex('people').count(),
    ],
    'an undefined binding': (knex) => settled(knex('people').where('id', undefined as never)),
    'many at once': (knex) => Promise.all(Array.from({ length: 30 }, (_, i) => insert(knex, `at once ${i}`))),
    batchInsert: (knex) =>
      knex
        .batchInsert<{ id: number; name: string }>(
          'people',
          ['x', 'y', 'z'].map((name) => ({ name })),
          2,
        )
        .returning('id'),
    'batchInsert that fails': (knex) =>
      settled(
        knex.batchInsert(
          'people',
          ['x', 'y', 'Ann'].map((name) => ({ name })),
          1,
        ),
      ),
    asCallback: (knex) =>
      new Promise((resolve) =>
        knex('people')
          .count()
          .asCallback((...results: unknown[]) => resolve(results)),
      ),
    Objection: async (knex) => [
      await Person.query(knex).insertAndFetch({ name: 'x' } as object),
      await Person.bindKnex(knex).query().resultSize(),
    ],
  },
  raw: {
    bindings: (knex) => knex.raw('select ?::int + :more as sum'.replace(':more', '?::int'), [1, 2]),
    'several statements': (knex) => knex.raw("insert into people (name) values ('x'); select count(*)::int from people"),
    'several statements, one of which fails': async (knex) => [
      await settled(knex.raw("insert into people (name) values ('x'); insert into people (name) values ('Ann')")),
      await knex('people').count(),
    ],
    'nothing but a comment': (knex) => knex.raw('-- commit'),
    'an empty text': (knex) => settled(knex.raw('')),
    'a syntax error': (knex) => settled(knex.raw('selec 1')),
    'a named statement, twice': async (knex) => [
      await knex.raw('select ?::int as n', [1]).options({ name: 'named' }),
      await knex.raw('select ?::int as n', [2]).options({ name: 'named' }),
    ],
    'rows as arrays': (knex) => knex.raw('select 1 as a, 2 as a').options({ rowMode: 'array' }),
    'words of transaction control in texts': (knex) => knex.raw('select \'commit; rollback\' as "begin;" -- end;\n'),
    'COMMIT outside of a transaction': (knex) => knex.raw('commit').then(({ command }) => command),
    'a function with a body': async (knex) => [
      await knex.raw('create function two() returns int language plpgsql as $$ begin return 2; end $$'),
      await knex.raw('select two()'),
    ],
    'a timeout': (knex) => settled(knex.raw('select pg_sleep(5)').timeout(20, { cancel: true })),
    'a timeout in a transaction': (knex) =>
      settled(knex.transaction(async (trx) => [await insert(trx, 'x'), await trx.raw('select pg_sleep(5)').timeout(20, { cancel: true })])),
  },
  schema: {
    'a table': async (knex) => {
      await knex.schema.createTable('pets', (table) => {
        table.increments();
        table.integer('owner').references('people.id').deferrable('deferred');
        table.jsonb('data').index();
      });
      await knex.schema.alterTable('pets', (table) => table.renameColumn('data', 'more'));
      return [await knex.schema.hasTable('pets'), await knex.schema.hasColumn('pets', 'more'), await knex('pets').columnInfo()];
    },
    'a statement of several that fails': async (knex) => [
      await settled(knex.schema.createTable('pets', (table) => table.increments()).createTable('people', () => {})),
      await knex.schema.hasTable('pets'),
    ],
    migrations: async (knex) => [
      await knex.migrate.latest({ migrationSource }),
      await knex.migrate.latest({ migrationSource }),
      await knex('pets'),
      await knex.migrate.rollback({ migrationSource }),
      await knex.migrate.up({ migrationSource, name: 'second' } as object),
      await knex.migrate.currentVersion(),
    ],
    'a migration that fails': async (knex) => {
      const failing = { ...migrationSource, getMigrations: async () => ['first', 'failing'] };
      const result = await settled(knex.migrate.latest({ migrationSource: failing }));
      return [result, await knex.schema.hasTable('pets'), await knex('knex_migrations_lock')];
    },
  },
  transaction: {
    'a callback': (knex) => knex.transaction(async (trx) => insert(trx, 'x').returning('name')),
    'a callback that throws': (knex) => settled(knex.transaction(async (trx) => Promise.reject([await insert(trx, 'x'), failure][1]))),
    'a statement that fails': (knex) => settled(knex.transaction(async (trx) => insert(trx, 'Ann'))),
    'an error that is swallowed': async (knex) => [
      await knex.transaction(async (trx) => [await insert(trx, 'x'), await settled(insert(trx, 'Ann')), await settled(trx('people'))]),
      await knex('people').count(),
    ],
    'by hand, committed': async (knex) => {
      const trx = await knex.transaction();
      await insert(trx, 'x');
      const before = trx.isCompleted();
      await trx.commit('value');
      return [before, trx.isCompleted(), await trx.executionPromise, await settled(trx('people'))];
    },
    'by hand, rolled back': async (knex) => {
      const trx = await knex.transaction();
      await insert(trx, 'x');
      await trx.rollback();
      return [trx.isCompleted(), await trx.executionPromise, await knex('people').count()];
    },
    'rolled back with an error': async (knex) => {
      const trx = await knex.transaction(null as never, { doNotRejectOnRollback: false });
      const execution = settled(trx.executionPromise);
      await trx.rollback(failure);
      return execution;
    },
    'a raw COMMIT': async (knex) =>
      settled(knex.transaction(async (trx) => [await insert(trx, 'x'), (await trx.raw('rollback')).command, await trx('people').count()])),
    savepoints: (knex) =>
      knex.transaction(async (trx) => {
        await insert(trx, 'one');
        const inner = await settled(trx.transaction(async (nested) => [await insert(nested, 'two'), await insert(nested, 'Ann')]));
        await trx.savepoint(async (nested) => nested.savepoint(async (third) => insert(third, 'three')));
        return [inner, await trx('people').pluck('name')];
      }),
    'savepoints at once': (knex) =>
      knex.transaction((trx) =>
        Promise.allSettled(['x', 'Ann', 'y'].map((name) => trx.transaction(async (nested) => insert(nested, name)))),
      ),
    'several at once': (knex) =>
      Promise.allSettled(['x', 'Ann', 'y'].map((name) => knex.transaction(async (trx) => [await insert(trx, name), name]))),
    'read only': (knex) => settled(knex.transaction(async (trx) => insert(trx, 'x'), { readOnly: true })),
    'with the isolation level of the server': (knex) =>
      knex.transaction(async (trx) => trx.raw('show transaction_isolation'), { isolationLevel: 'read committed' }),
    transactionProvider: async (knex) => {
      const provide = knex.transactionProvider();
      await insert(await provide(), 'x');
      await (await provide()).commit();
      return (await provide()).executionPromise;
    },
    userParams: async (knex) => {
      const tenant = knex.withUserParams({ tenant: 1 });
      return [
        tenant.userParams,
        await tenant('people').count(),
        await tenant.transaction(async (trx) => insert(trx, 'x'), { userParams: { tenant: 2 } }),
      ];
    },
    'a session': (knex) =>
      settled(
        withSession(knex, async (session) => [
          await insert(session, 'x'),
          await session.transaction(async (inner) => insert(inner, 'Ann')),
        ]),
      ),
  },
  connection: {
    'promises and callbacks': onConnection(async (connection) => [
      await connection.query('select 1 as n'),
      await connection.query('select $1::int as n', [2]),
      await connection.query({ text: 'select $1::int as n', values: [3] }),
      await connection.query({ text: 'select $1::int as n' }, [4]),
      await new Promise((resolve) => connection.query('select 5 as n', (...results: unknown[]) => resolve(results))),
      await new Promise((resolve) => connection.query('select $1::int as n', [6], (...results: unknown[]) => resolve(results))),
      await new Promise((resolve) => connection.query({ text: 'select 7 as n', callback: (...results: unknown[]) => resolve(results) })),
    ]),
    errors: onConnection(async (connection) => [
      await settled(connection.query('selec')),
      await new Promise((resolve) => connection.query('selec', (...results: unknown[]) => resolve(results))),
      await connection.query('select 1 as n'),
    ]),
    'a text that is a property of its class': onConnection((connection) =>
      connection.query(
        new (class {
          get text() {
            return 'select $1::int as n';
          }
          values = [1];
        })(),
      ),
    ),
    "a transaction, and pg's word on it": onConnection(async (connection) => {
      const told = [connection.getTransactionStatus()];
      for (const text of [
        'begin',
        "insert into people (name) values ('x')",
        'savepoint s',
        'selec',
        'rollback to s',
        'selec',
        'commit',
        'rollback',
      ]) {
        const result: any = await settled(connection.query(text));
        // Right after an error pg says what was true before it.
        told.push(result.value ? [result.value.command, connection.getTransactionStatus()] : result.reason.code);
      }
      return told;
    }),
    "pg's own queries": onConnection(async (connection) => {
      const query = connection.query(new Query('select 1 as n') as never);
      const told = Promise.all(['row', 'end'].map((event) => once(query, event)));
      const stream = connection.query(new QueryStream('select i from generate_series(1, 3) i'));
      return [(await told)[0]?.[0], await read(stream)];
    }),
    'an end by the application': async (knex) => {
      await onConnection((connection) => connection.end())(knex);
      return knex('people').count();
    },
  },
  'stream at the root': streams((knex, work) => work(knex)),
  'stream in a transaction': streams((knex, work) => settled(knex.transaction(async (trx) => work(trx)))),
  'stream in a session': streams((knex, work) => settled(withSession(knex, async (session) => work(session)))),
};

const migrationSource = {
  getMigrations: async () => ['first', 'second'],
  getMigrationName: (name: string) => name,
  getMigration: async (name: string) => ({
    up: (knex: Knex) =>
      name === 'first'
        ? knex.schema.createTable('pets', (table) => table.text('name'))
        : knex(name === 'failing' ? 'nothing' : 'pets').insert({ name: 'Rex' }),
    down: (knex: Knex) => (name === 'first' ? knex.schema.dropTable('pets') : knex('pets').del()),
  }),
} as unknown as Knex.MigrationSource<string>;

const EVENTS = ['start', 'query', 'query-error', 'query-response'];

type Manner = Record<'isOrdered' | 'isCancelled', boolean>;

/** Runs a use; what came of it, what was stored as the use's own Knex sees it, and what listeners heard. */
async function outcomeOf(use: Use, knex: Knex, { isOrdered, isCancelled }: Manner, listeningTo = knex): Promise<unknown> {
  const heard: unknown[][] = [];
  const listeners = EVENTS.map((event) => (...values: any[]) => {
    const told = values.find((value) => value?.sql);
    heard.push([event, told?.sql, event === 'query' ? told?.bindings : undefined, event === 'query-error' ? values[0] : undefined]);
  });
  for (const [i, event] of EVENTS.entries()) listeningTo.on(event, listeners[i] as () => void);
  const [result] = await Promise.allSettled([use(knex)]);
  for (const [i, event] of EVENTS.entries()) listeningTo.off(event, listeners[i] as () => void);
  // Of things that run at once, each may come first.
  if (!isOrdered) heard.sort((a, b) => (JSON.stringify(a) < JSON.stringify(b) ? -1 : 1));
  // Knex does not wait for the end of what it has cancelled.
  if (isCancelled) for (const one of heard.filter(([event]) => event === 'query-error')) heard.splice(heard.indexOf(one), 1);
  return comparable({ result, heard, people: await knex('people').orderBy('name').select('name', 'balance'), used: poolUsage(knex).used });
}

describe.each(Object.entries(uses))('when it is used as Knex: %s', (_area, some) => {
  let knexes: Knex[];
  const endTest = async () => {};
  afterEach(() => endTest());
  beforeAll(() => {
    const wrapIdentifier = (value: string, wrap: (value: string) => string) => wrap(value.toLowerCase());
    const postProcessResponse = (result: any) => (Array.isArray(result) ? [...result, 'processed'] : result);
    knexes = [0, 1].map(() => ledger.connect({ wrapIdentifier, postProcessResponse, log }));
  });

  it.each(Object.entries(some).map(([name, use], i) => ({ name, use, i })))(
    '$name: does the same, says the same, and is rolled back (69)',
    async ({ name, use, i }) => {
      const [plain, original] = knexes as [Knex, Knex];
      const manner = { isOrdered: !/at once|timeout/.test(name), isCancelled: name.includes('timeout') };
      const expected = await outcomeOf(use, plain, manner);
      await ledger.reset();

      const { knex, begin, rollback } = testDatabase(original);
      await begin();
      // Listeners hear it on either.
      const seen = await outcomeOf(use, knex, manner, i % 2 ? knex : original);
      await rollback();

      expect(seen).toEqual(expected);
      expect(poolUsage(original)).toMatchObject({ used: 0 });
      expect(await ledger.names()).toEqual(UNCHANGED);
      expect(await ledger.admin.schema.hasTable('pets')).toBe(false);
    },
  );
});

// Knex warns of a connection that it takes out of its pool.
const log = { warn() {}, error() {}, debug() {}, deprecate() {} };
