import express, { type RequestHandler } from 'express';
import { type Session, scopedSession, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { Model } from 'objection';
import { get, listen } from './support/http';
import { answerError, caught, insert, Ledger, UNCHANGED } from './support/knex';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = Ledger.forTests();
const failure = new RangeError('no');
let db: Knex;
let autocommitting: Knex;

beforeAll(() => {
  db = scopedSession(ledger.knex);
  autocommitting = scopedSession(ledger.knex, { outside: 'autocommit' });
});
afterEach(() => expect(poolUsage(ledger.knex)).toMatchObject({ used: 0, pendingAcquires: 0 }));

/** Serves one request by code that has no request. */
async function serve(handler: () => unknown) {
  const app = express().use(sessionMiddleware(ledger.knex, { context: true }));
  const route: RequestHandler = async (_req, res) => {
    await handler();
    res.end();
  };
  const server = await listen(app.get('/{*path}', route).use(sessionErrorHandler(), answerError));
  const answer = await get(server.url);
  await server.close();
  return answer;
}

class Person extends Model {
  static override tableName = 'people';
}

describe('when it runs outside of a request', () => {
  const uses: [string, (knex: Knex) => unknown][] = [
    ['a query', (knex) => insert(knex, 'x')],
    ['raw', (knex) => knex.raw("insert into people (name) values ('x')")],
    ['a transaction', (knex) => knex.transaction((trx) => insert(trx, 'x'))],
    [
      'a transaction by hand',
      async (knex) => {
        const trx = await knex.transaction();
        await insert(trx, 'x');
        await trx.commit();
      },
    ],
    ['batchInsert', (knex) => knex.batchInsert('people', [{ name: 'x' }])],
    [
      'a stream',
      async (knex) => {
        for await (const _ of knex.raw("insert into people (name) values ('x') returning *").stream());
      },
    ],
    [
      'a Model bound to it',
      (knex) =>
        Person.bindKnex(knex)
          .query()
          .insert({ name: 'x' } as object),
    ],
  ];

  it.each(uses)('is refused, and no connection is taken: %s', async (_name, run) => {
    const unused = ledger.connect({ pool: { min: 0, max: 1 } });
    expect(await caught((async () => run(scopedSession(unused)))())).toMatchObject({ code: 'ERR_SESSION_MISSING' });
    expect(poolUsage(unused)).toEqual({ used: 0, free: 0, pendingAcquires: 0 });
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it.each(uses)('commits by itself, if it was asked to: %s', async (_name, run) => {
    await run(autocommitting);
    expect(await ledger.names()).toEqual([...UNCHANGED, 'x']);
  });

  it('keeps transactions that are its own', async () => {
    await caught(autocommitting.transaction(async (trx) => [await insert(trx, 'x'), await Promise.reject(failure)]));
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it('destroys and initializes the pool of its Knex', async () => {
    const knex = ledger.connect();
    const own = scopedSession(knex, { outside: 'autocommit' });
    await own.destroy();
    expect(knex.client.pool).toBeUndefined();
    own.initialize();
    expect(await own('people').pluck('name')).toEqual(UNCHANGED);
    await knex.destroy();
  });

  it('migrates the database of its Knex, as at the start of an app, and refuses that in a request', async () => {
    const migrationSource = {
      getMigrations: async () => ['1'],
      getMigrationName: (name: string) => name,
      getMigration: async () => ({
        up: (knex: Knex) => knex.schema.createTable('made', (table) => table.increments()),
        down: async () => {},
      }),
    };
    const refused: unknown[] = [];
    await serve(async () => refused.push(await caught((async () => db.migrate.latest({ migrationSource }))())));
    expect(refused).toMatchObject([{ code: 'ERR_SESSION_DESTROY' }]);
    await db.migrate.latest({ migrationSource });
    expect(await ledger.admin.schema.hasTable('made')).toBe(true);
    await ledger.admin.raw('DROP TABLE made, knex_migrations, knex_migrations_lock');
  });

  it('is the session of withSession(), there and in a request', async () => {
    const work = async (session: Session) => [await insert(db, 'x'), await insert(session, 'y'), await Promise.reject(failure)];
    await caught(withSession(ledger.knex, work));
    await serve(async () => [await caught(withSession(ledger.knex, work)), await insert(db, 'z')]);
    expect(await ledger.names()).toEqual([...UNCHANGED, 'z']);
  });
});

describe('when it is made', () => {
  it.each([
    [() => scopedSession(undefined as never), /Expected `knex`/],
    [() => scopedSession({} as never), /Expected `knex`/],
    [() => scopedSession(ledger.knex, { outside: 'pool' as never }), /^Expected `outside` to be 'throw' or 'autocommit', got 'pool'/],
    [() => scopedSession(ledger.knex, { inside: 'x' } as never), /^Unknown option `inside`/],
    [() => scopedSession(ledger.knex, { outside: null as never }), /^Expected `outside`/],
  ])('refuses what it cannot use: %p', (make, message) => {
    expect(make).toThrow(TypeError);
    expect(make).toThrow(message);
  });

  it('looks like the Knex that it stands for, and is no transaction', () => {
    expect([typeof db, db.isTransaction, db.client.config === ledger.knex.client.config, db('people').toString()]).toEqual([
      'function',
      ledger.knex.isTransaction,
      true,
      'select * from "people"',
    ]);
  });
});
