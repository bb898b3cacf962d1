import express, { type RequestHandler } from 'express';
import { currentSession, scopedSession, sessionErrorHandler, sessionMiddleware, sessionOptions } from 'express-knex-session';
import type { Knex } from 'knex';
import { Model } from 'objection';
import { get, listen } from './support/http';
import { answerError, caught, insert, Ledger, plainly, UNCHANGED, type Use, type Way } from './support/knex';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = Ledger.forTests();
let db: Knex;
let autocommitting: Knex;

beforeAll(() => {
  db = scopedSession(ledger.knex);
  autocommitting = scopedSession(ledger.knex, { outside: 'autocommit' });
});
afterEach(() => expect(poolUsage(ledger.knex)).toMatchObject({ used: 0, pendingAcquires: 0 }));

/** Serves one request by code that has no request; `mounted` stands before it. */
async function serve(handler: (req: express.Request, res: express.Response) => unknown, ...mounted: RequestHandler[]) {
  const app = express().use(mounted.length > 0 ? mounted : sessionMiddleware(ledger.knex, { context: true }));
  const route: RequestHandler = async (req, res) => {
    await handler(req, res);
    if (!res.headersSent) res.end();
  };
  const server = await listen(app.get(/.*/, route).use(sessionErrorHandler(), answerError));
  const answer = await get(server.url);
  await server.close();
  return answer;
}

/** As `plainly`, by the `db` that is imported. */
const scoped: Way = async (knex, work) => {
  let outcome: PromiseSettledResult<unknown> | undefined;
  await serve(async () => {
    [outcome] = await Promise.allSettled([Promise.resolve(scopedSession(knex)).then((imported) => work(imported as never))]);
    if (outcome?.status === 'rejected') throw outcome.reason;
  });
  if (outcome?.status === 'rejected') throw outcome.reason;
  return outcome?.value;
};

class Payment extends Model {
  static override tableName = 'payments';
}

class Person extends Model {
  static override tableName = 'people';
  static override relationMappings = () => ({
    payments: { relation: Model.HasManyRelation, modelClass: Payment, join: { from: 'people.id', to: 'payments.person_id' } },
  });
}

describe('when code that imports one db runs in a request', () => {
  const uses: Use[] = [
    { name: 'select', run: (knex) => knex('people').where('balance', '>', 10).orderBy('id').limit(1) },
    {
      name: 'first, pluck, count',
      run: async (knex) => [await knex('people').first(), await knex('people').pluck('name'), await knex('people').count()],
    },
    {
      name: 'insert, update, delete with returning',
      run: async (knex) => [
        await knex('people').insert({ name: 'Dan' }).returning('id'),
        await knex('people')
          .where({ id: 1 })
          .update({ balance: knex.raw('balance + ?', [1]) }),
        await knex('people').where({ id: 2 }).del(),
      ],
    },
    { name: 'on conflict', run: (knex) => knex('people').insert({ name: 'Ann', balance: 7 }).onConflict('name').merge() },
    {
      name: 'with, queryBuilder, from, ref',
      run: (knex) =>
        knex
          .with('rich', knex.queryBuilder().from('people').where('balance', '>', 10))
          .from('rich')
          .select(knex.ref('rich.name'))
          .orderBy('id'),
    },
    {
      name: 'raw with bindings',
      run: async (knex) => (await knex.raw('select ?? from people where id = ?', ['name', 1])).rows,
    },
    {
      name: 'fn',
      run: async (knex) =>
        await knex('people')
          .select({ same: knex.raw('? = ?', [knex.fn.now(), knex.fn.now()]) })
          .first(),
    },
    {
      name: 'schema',
      run: async (knex) => [
        await knex.schema.createTable('more', (table) => table.increments('id')),
        await knex.schema.hasTable('more'),
        await knex.schema.dropTable('more'),
      ],
    },
    {
      name: 'batchInsert',
      run: (knex) => knex.batchInsert<any>('people', [{ name: 'Dan' }, { name: 'Eve' }, { name: 'Fay' }], 2).returning('id'),
    },
    {
      name: 'stream',
      run: async (knex) => {
        const rows = [];
        for await (const row of knex('people').orderBy('id').stream()) rows.push(row);
        return rows;
      },
    },
    { name: 'an error', fails: true, run: (knex) => insert(knex, 'Ann') },
    { name: 'an error in one of two', fails: true, run: async (knex) => [await insert(knex, 'Dan'), await insert(knex, 'Ann')] },
    {
      name: 'transaction()',
      run: (knex) => knex.transaction(async (trx) => [await insert(trx, 'Dan'), await trx.transaction((inner) => insert(inner, 'Eve'))]),
    },
    {
      name: 'transaction() that fails, and is caught',
      run: async (knex) => [
        await insert(knex, 'Dan'),
        await caught(knex.transaction(async (trx) => [await insert(trx, 'Eve'), await insert(trx, 'Ann')])),
        await knex('people').pluck('name'),
      ],
    },
    {
      name: 'transaction() by hand',
      run: async (knex) => {
        const trx = await knex.transaction();
        await insert(trx, 'Dan');
        await trx.rollback();
        const other = await knex.transaction();
        await insert(other, 'Eve');
        await other.commit();
      },
    },
    {
      name: 'transactionProvider()',
      run: async (knex) => {
        const trx = await knex.transactionProvider()();
        await insert(trx, 'Dan');
        await trx.commit();
      },
    },
    { name: 'transacting()', run: (knex) => knex.transaction((trx) => knex('people').insert({ name: 'Dan' }).transacting(trx)) },
    { name: 'a timeout with cancel', fails: true, run: (knex) => knex.raw('select pg_sleep(1)').timeout(20, { cancel: true }) },
    {
      name: 'a Model bound to it, graph and eager',
      run: async (knex) => {
        const Bound = Person.bindKnex(knex);
        await Bound.query().insertGraph({ name: 'Dan', payments: [{ amount: 1 }, { amount: 2 }] } as object);
        return Bound.query().withGraphFetched('payments').orderBy('id');
      },
    },
    {
      name: 'a transaction of a Model bound to it',
      run: async (knex) => {
        const Bound = Person.bindKnex(knex);
        const trx = await Bound.startTransaction();
        await Bound.query(trx).insert({ name: 'Dan' } as object);
        await trx.commit();
        return Bound.transaction(async (inner) => Bound.query(inner).findById(1));
      },
    },
  ];

  // Objection asks for a table's columns once, and remembers them.
  beforeAll(async () => {
    await ledger.reset();
    for (const model of [Person, Payment]) await model.fetchTableMetadata({ knex: ledger.knex } as object);
  });

  it.each(uses)('gives, runs and stores what knex.transaction() does: $name', async ({ run, fails = false }) => {
    const plain = await ledger.outcomeOf(plainly, run);
    expect(plain).toMatchObject({ result: { status: fails ? 'rejected' : 'fulfilled' } });
    expect(await ledger.outcomeOf(scoped, run)).toEqual(plain);
  });

  it('is one unit of work with req.session, in order, and is rolled back with the request', async () => {
    for (const status of [200, 400]) {
      await ledger.reset();
      const ids = new Set<string>();
      await serve(async (req, res) => {
        for (const knex of [db, req.session, currentSession(), autocommitting])
          ids.add((await knex.raw('select pg_current_xact_id()::text as id')).rows[0].id);
        await Promise.all([insert(db, 'x'), insert(req.session, 'y'), db.transaction((trx) => insert(trx, 'z'))]);
        res.status(status).end();
      });
      expect(ids.size).toBe(1);
      expect(await ledger.names()).toEqual(status === 200 ? [...UNCHANGED, 'x', 'y', 'z'] : UNCHANGED);
    }
  });

  it('runs a query where it is awaited: built outside, or by another request', async () => {
    const outside = insert(db, 'x');
    let built: Knex.QueryBuilder | undefined;
    await serve((_req, res) => {
      built = insert(db, 'y');
      res.end();
    });
    expect(await caught(built as Knex.QueryBuilder)).toMatchObject({ code: 'ERR_SESSION_MISSING' });
    await serve(async (_req, res) => [await outside, await built?.clone(), res.status(400).end()]);
    expect(await ledger.names()).toEqual(UNCHANGED);
    await serve(async () => [await outside.clone(), await built?.clone()]);
    expect(await ledger.names()).toEqual([...UNCHANGED, 'x', 'y']);
  });

  it('lets listeners hear each statement once: those of db, of the session, of the savepoint and of the query', async () => {
    const heard: Record<string, string[]> = { db: [], knex: [], session: [], savepoint: [], query: [] };
    const on = (name: string) => (event: { sql: string }) => void heard[name]?.push(event.sql.replace(/session\d+/, 's'));
    const [onDb, onKnex] = [on('db'), on('knex')];
    db.on('query', onDb);
    ledger.knex.on('query', onKnex);
    await serve(async (req) => {
      req.session.on('query', on('session'));
      await db('people').select('id').on('query', on('query'));
      await db.transaction(async (trx) => {
        trx.on('query', on('savepoint'));
        await trx('people').select('name');
      });
    });
    db.off('query', onDb);
    ledger.knex.off('query', onKnex);
    const [id, name] = ['select "id" from "people"', 'select "name" from "people"'];
    const all = ['BEGIN;', id, 'SAVEPOINT s;', name, 'RELEASE SAVEPOINT s;', 'COMMIT;'];
    expect(heard).toEqual({ db: all, knex: all, session: all, savepoint: [name, 'RELEASE SAVEPOINT s;'], query: [id] });
    expect(ledger.knex.listenerCount('query')).toBe(0);
  });

  it('autocommits where the route has no transaction', async () => {
    await serve(
      async (_req, res) => [await insert(db, 'x'), res.status(400).end()],
      sessionMiddleware(ledger.knex, { context: true }),
      sessionOptions({ transaction: false }),
    );
    expect(await ledger.names()).toEqual([...UNCHANGED, 'x']);
  });

  it('refuses a statement after the end of the request, and does not send it to the pool', async () => {
    for (const knex of [db, autocommitting]) {
      let late: Promise<unknown> | undefined;
      await serve((_req, res) => {
        res.once('finish', () => {
          late = caught(insert(knex, 'late'));
        });
      });
      expect(await late).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    }
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it('refuses destroy() and initialize(), and the pool lives', async () => {
    await serve(async () => {
      for (const name of ['destroy', 'initialize'] as const) {
        expect(await caught((async () => db[name]())())).toMatchObject({ code: 'ERR_SESSION_DESTROY' });
      }
      await insert(db, 'x');
    });
    expect(await ledger.names()).toContain('x');
  });
});
