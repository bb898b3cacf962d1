import express, { type RequestHandler } from 'express';
import {
  currentSession,
  retryable,
  type SessionOptions,
  scopedSession,
  sessionErrorHandler,
  sessionMiddleware,
} from 'express-knex-session';
import type { Knex } from 'knex';
import { createDatabase, type TestDatabase } from './support/database';
import { get, listen } from './support/http';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

let database: TestDatabase;
let knex: Knex;
let db: Knex;
const reported: unknown[] = [];

beforeAll(async () => {
  database = await createDatabase();
  await database.admin.raw('CREATE TABLE items (id serial PRIMARY KEY, name text, tenant text)');
  knex = database.knex({ pool: { min: 0, max: 2 } });
  db = scopedSession(knex);
});
beforeEach(async () => {
  reported.length = 0;
  await database.admin('items').truncate();
});
afterEach(() => eventually(() => expect(poolUsage(knex)).toMatchObject({ used: 0, pendingAcquires: 0 })));
afterAll(() => database.drop());

const stored = () => database.admin('items').orderBy('id').pluck('name');
const insert = (session: Knex, name: string) => session('items').insert({ name });

async function serve(options: SessionOptions, ...handlers: RequestHandler[]) {
  const app = express();
  app.use(sessionMiddleware(knex, { onError: (error) => reported.push(error), ...options }));
  app.get('/', ...handlers);
  app.use(sessionErrorHandler());
  const server = await listen(app);
  const answer = await get(server.url, { signal: AbortSignal.timeout(5_000) });
  await server.close();
  return answer;
}

describe('when services that import one `db` call each other inside of their transactions', () => {
  const context = { context: true };

  it('nests their savepoints', async () => {
    const inner = () => db.transaction((trx) => insert(trx, 'inner'));
    const outer = () =>
      db.transaction(async (trx) => {
        await insert(trx, 'outer');
        await inner();
      });
    expect((await serve(context, async (_req, res) => res.json(await outer()))).status).toBe(200);
    expect(await stored()).toEqual(['outer', 'inner']);
  });

  it('rolls back with the transaction what is called in it', async () => {
    const answer = await serve(context, async (_req, res) => {
      await insert(db, 'before');
      const failing = db.transaction(async () => {
        await insert(db, 'inside');
        throw new Error('no');
      });
      await failing.catch(() => {});
      await insert(db, 'after');
      res.end();
    });
    expect(answer.status).toBe(200);
    expect(await stored()).toEqual(['before', 'after']);
  });

  it('drops hooks that were registered there', async () => {
    const seen: string[] = [];
    await serve(context, async (_req, res) => {
      const failing = db.transaction(async () => {
        currentSession().afterCommit(() => void seen.push('rolled back'));
        throw new Error('no');
      });
      await failing.catch(() => {});
      currentSession().afterCommit(() => void seen.push('kept'));
      res.end();
    });
    expect(seen).toEqual(['kept']);
  });
});

describe('when the functions of the options would give something else later', () => {
  it('keeps what they gave, after a checkpoint and in hooks', async () => {
    const tenants: string[] = [];
    let asked = 0;
    const look = async (session: Knex) => {
      const { rows } = await session.raw("SELECT current_setting('app.tenant') AS tenant");
      tenants.push(rows[0].tenant);
    };
    await serve({ settings: () => ({ 'app.tenant': `t${++asked}` }) }, async (req, res) => {
      req.session.afterCommit(look);
      await look(req.session);
      await req.session.checkpoint();
      await look(req.session);
      req.session.afterCommit(look);
      res.end();
    });
    expect(tenants).toEqual(['t1', 't1', 't1', 't1']);
  });

  it('lets session.set() win, whatever the case of the name', async () => {
    const answer = await serve({ settings: { 'App.Tenant': 'a' } }, async (req, res) => {
      await req.session.set({ 'app.tenant': 'b' });
      res.json((await req.session.raw("SELECT current_setting('app.tenant') AS tenant")).rows);
    });
    expect(answer.body).toBe('[{"tenant":"b"}]');
  });
});

describe('when the first statement comes in a beforeCommit hook', () => {
  it.each(['head', 'end', 'finish'] as const)("is stored, with commitAt: '%s'", async (commitAt) => {
    await serve({ commitAt }, (req, res) => {
      req.session.beforeCommit((session) => insert(session, 'audit'));
      res.end();
    });
    await eventually(async () => expect(await stored()).toEqual(['audit']));
    expect(reported).toEqual([]);
  });
});

describe('when there is no transaction, and the session ends before its first statement', () => {
  it('takes none, and runs the hooks of one end only', async () => {
    const seen: string[] = [];
    let late: unknown;
    await serve({ transaction: false }, async (req, _res, next) => {
      req.session.afterCommit(() => void seen.push('afterCommit'));
      req.session.afterRollback(() => void seen.push('afterRollback'));
      next(new Error('no'));
      await new Promise(setImmediate);
      late = await insert(req.session, 'late').then(
        () => 'stored',
        (error) => error.code,
      );
    });
    expect(late).toBe('ERR_SESSION_CLOSED');
    expect(seen).toEqual(['afterRollback']);
    expect(await stored()).toEqual([]);
  });

  it('takes none after commit()', async () => {
    const answer = await serve({ transaction: false }, async (req, res) => {
      await req.session.commit();
      const code = await insert(req.session, 'late').then(
        () => 'stored',
        (error) => error.code,
      );
      res.send(code);
    });
    expect(answer.body).toBe('ERR_SESSION_CLOSED');
  });
});

describe('when one of two sessions of a retryable handler only reads', () => {
  it('repeats both after a serialization failure of the other', async () => {
    let attempt = 0;
    const app = express();
    app.use(sessionMiddleware(knex, { property: 'replica', readOnly: true }));
    app.use(sessionMiddleware(knex));
    app.get(
      '/',
      retryable(async (req, res) => {
        const isFirst = ++attempt === 1;
        await (req as unknown as { replica: Knex }).replica('items').first();
        await insert(req.session, `attempt ${attempt}`);
        req.session.beforeCommit(() => {
          if (isFirst) throw Object.assign(new Error('not serializable'), { code: '40001' });
        });
        res.end();
      }),
    );
    app.use(sessionErrorHandler());
    const server = await listen(app);
    expect((await get(server.url)).status).toBe(200);
    await server.close();
    expect(await stored()).toEqual(['attempt 2']);
  });
});
