import { readFileSync } from 'node:fs';
import path from 'node:path';
import express, { type RequestHandler } from 'express';
import { currentSession, type Session, scopedSession, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import { testDatabase } from 'express-knex-session/testing';
import type { Knex } from 'knex';
import { Model } from 'objection';
import { createDatabase, type TestDatabase } from './support/database';
import { get, listen } from './support/http';
import { answerError, caught } from './support/knex';
import { after, before, SHOP } from './support/three-services';
import { failOnWarnings } from './support/warnings';
import { atRest, sent } from './support/wire';
import { startWireProxy, type WireProxy } from './support/wire-proxy';

failOnWarnings();
let database: TestDatabase;
let other: TestDatabase;
let proxy: WireProxy;
let knex: Knex;
let db: Knex;

beforeAll(async () => {
  [database, other] = await Promise.all([createDatabase(), createDatabase()]);
  proxy = await startWireProxy(database.url);
  knex = database.knex({ connection: proxy.url, pool: { min: 0, max: 3 } });
  db = scopedSession(knex);
});
beforeEach(async () => {
  await Promise.all([database.admin.raw(SHOP), other.admin.raw(SHOP)]);
  proxy.reset();
});
afterEach(() => atRest(knex));
afterAll(async () => {
  await Promise.all([database.drop(), other.drop()]);
  await proxy.close();
});

const noted = (of = database) => of.admin('audit').orderBy('id').pluck('action');
const note = (by: Knex, action: string) => by('audit').insert({ action });

async function serve(app: express.Express, ...paths: string[]) {
  const server = await listen(app.use(sessionErrorHandler(), answerError));
  const answers = [];
  for (const each of paths) answers.push(await get(server.url + each));
  await server.close();
  return answers;
}

async function statusOf(handler: RequestHandler, ...mounted: RequestHandler[]) {
  const [answer] = await serve(
    express()
      .use(...mounted)
      .get('/', handler),
    '/',
  );
  return answer?.status;
}

describe('when an app of three services that import one db is converted', () => {
  it('takes five changed lines', () => {
    const source = readFileSync(path.join(__dirname, 'support', 'three-services.ts'), 'utf8');
    const linesOf = (name: string) =>
      new RegExp(`export function ${name}\\(.*?{\n(.*?)\n}`, 's').exec(source)?.[1]?.split('\n') as string[];
    const [old, converted] = [linesOf('before'), linesOf('after')];
    // And the import of the package.
    expect(converted.filter((line) => !old.includes(line))).toHaveLength(4);
    expect(old.filter((line) => !converted.includes(line))).toEqual(['  const db = createDb();']);
  });

  it('stores all of a request or nothing, which it did not before, and its transactions are savepoints', async () => {
    const state = async () => [
      await database.admin('orders').count().first(),
      await noted(),
      await database.admin('stock').orderBy('item').pluck('amount'),
    ];
    const orders = ['/order/book', '/order/pen', '/order/book', '/order/book', '/audit'];

    const asBefore = await serve(
      before(() => knex),
      ...orders,
    );
    expect(asBefore.map(({ status }) => status)).toEqual([201, 500, 201, 500, 200]);
    expect(await state()).toEqual([
      { count: '4' },
      ['order of book', 'took book', 'order of pen', 'order of book', 'took book', 'order of book'],
      [0, 0],
    ]);

    await database.admin.raw(SHOP);
    const asAfter = await serve(
      after(() => knex),
      ...orders,
    );
    expect(asAfter.map(({ status }) => status)).toEqual([201, 500, 201, 500, 200]);
    expect(await state()).toEqual([{ count: '2' }, ['order of book', 'took book', 'order of book', 'took book'], [0, 0]]);
    expect(asAfter[4]?.body).toBe(JSON.stringify(await noted()));
    expect(sent(proxy)).toContain('SAVEPOINT');
  });
});

describe('when Objection models are bound to it once', () => {
  class Audit extends Model {
    static override tableName = 'audit';
    declare id: number;
    declare action: string;
  }
  class Order extends Model {
    static override tableName = 'orders';
    static override relationMappings = () => ({
      notes: { relation: Model.HasManyRelation, modelClass: Audit, join: { from: 'orders.item', to: 'audit.action' } },
    });
    declare notes?: Audit[];
  }

  beforeAll(async () => {
    await database.admin.raw(SHOP);
    for (const model of [Audit, Order]) {
      await model.fetchTableMetadata({ knex: database.admin } as object);
      model.knex(db);
    }
  });

  it.each([200, 400])('runs all of it in the session of the request: a %d', async (status) => {
    const seen: unknown[] = [];
    const handler: RequestHandler = async (_req, res) => {
      await Order.query().insertGraph({ item: 'book', notes: [{}, {}] } as object);
      await Order.transaction(async (trx) => Audit.query(trx).insert({ action: 'book' }));
      await caught(
        Audit.transaction(async (trx) => [await Audit.query(trx).insert({ action: 'book' }), await Promise.reject(new Error())]),
      );
      const order = await Order.query().withGraphFetched('notes').first();
      seen.push(
        order?.notes?.length,
        (await db.raw('select pg_current_xact_id()::text as id')).rows[0].id ===
          (await currentSession().raw('select pg_current_xact_id()::text as id')).rows[0].id,
      );
      res.status(status).end();
    };
    expect(await statusOf(handler, sessionMiddleware(knex, { context: true }))).toBe(status);
    expect(seen).toEqual([3, true]);
    expect(await noted()).toEqual(status === 200 ? ['book', 'book', 'book'] : []);
    expect(proxy.sql().filter((sql) => /^(BEGIN|COMMIT|ROLLBACK$)/.test(sql))).toHaveLength(2);
  });

  it('refuses them outside of requests', async () => {
    expect(await caught(Order.query())).toMatchObject({ code: 'ERR_SESSION_MISSING' });
  });
});

describe('when there are two databases', () => {
  it('means the session on its own Knex, with hooks and units of work as well', async () => {
    const otherKnex = other.knex();
    const otherDb = scopedSession(otherKnex);
    const handler: RequestHandler = async (req, res) => {
      await Promise.all([note(db, 'one'), note(otherDb, 'two')]);
      await withSession(otherKnex, async () => [await note(db, 'one, in a unit of the other'), await note(otherDb, 'two, in a unit')]);
      req.session.afterCommit(async () => void (await note(db, 'one, in a hook')));
      res.end();
    };
    const mounts = [sessionMiddleware(knex, { context: true }), sessionMiddleware(otherKnex, { context: true, property: 'other' })];
    expect(await statusOf(handler, ...mounts)).toBe(200);
    expect(await noted()).toEqual(['one', 'one, in a unit of the other', 'one, in a hook']);
    expect((await noted(other)).sort()).toEqual(['two', 'two, in a unit']);
  });

  it('is refused where its own Knex has no session, and does not take the other', async () => {
    const otherDb = scopedSession(other.knex(), { outside: 'autocommit' });
    const found: any[] = [];
    await statusOf(
      async (_req, res) => [found.push(await caught(note(otherDb, 'x'))), res.end()],
      sessionMiddleware(knex, { context: true }),
    );
    expect(found).toMatchObject([{ code: 'ERR_SESSION_MISSING', message: expect.stringContaining('with the same one') }]);
    expect([await noted(), await noted(other)]).toEqual([[], []]);
  });
});

describe('when the Knex is chosen for each request', () => {
  it('means the one that was chosen, in hooks as well', async () => {
    const otherKnex = other.knex();
    const app = express()
      .use(sessionMiddleware((req) => (req.path === '/other' ? otherKnex : knex), { context: true }))
      .get('/{*path}', async (req, res) => {
        await note(db, 'handler');
        req.session.beforeCommit(async () => void (await note(db, 'beforeCommit')));
        req.session.afterCommit(async () => void (await note(db, 'afterCommit')));
        res.end();
      });
    expect((await serve(app, '/other', '/')).map(({ status }) => status)).toEqual([200, 200]);
    const expected = ['handler', 'beforeCommit', 'afterCommit'];
    expect([await noted(), await noted(other)]).toEqual([expected, expected]);
  });
});

describe('when the middleware is mounted in a sub-app', () => {
  it('is that of the request there, and there only; the outer one if both have it', async () => {
    const route: RequestHandler = async (req, res) => [await note(db, req.originalUrl), res.end()];
    const sub = express()
      .use(sessionMiddleware(knex, { context: true }))
      .get('/', route);
    const router = express
      .Router()
      .use(sessionMiddleware(knex, { context: true }))
      .get('/', route);
    const app = express().use('/sub', sub).use('/router', router).get('/outside', route);
    expect((await serve(app, '/sub', '/router', '/outside')).map(({ status }) => status)).toEqual([200, 200, 500]);

    const outer = express()
      .use(sessionMiddleware(knex, { context: true }))
      .use('/twice', sub);
    expect((await serve(outer, '/twice')).map(({ status }) => status)).toEqual([200]);
    expect(await noted()).toEqual(['/sub', '/router', '/twice']);
  });
});

describe('when a second copy of the package is loaded (scenario 74)', () => {
  it('finds the session of the first', async () => {
    let copy: typeof import('express-knex-session') | undefined;
    jest.isolateModules(() => {
      copy = require('express-knex-session');
    });
    const { scopedSession: scopedOfCopy, currentSession: currentOfCopy } = copy as typeof import('express-knex-session');
    expect(scopedOfCopy).not.toBe(scopedSession);
    const theirs = scopedOfCopy(knex);
    const handler: RequestHandler = async (req, res) => {
      await note(theirs, 'a');
      await note(currentOfCopy(), 'b');
      await theirs.transaction((trx) => note(trx, 'c'));
      for await (const { action } of theirs('audit').orderBy('id').stream()) await note(req.session, `${action} again`).catch(() => {});
      (currentOfCopy() as Session).setRollbackOnly();
      res.end();
    };
    expect(await statusOf(handler, sessionMiddleware(knex, { context: true }))).toBe(200);
    expect(proxy.sql().filter((sql) => /^insert/.test(sql))).toHaveLength(6);
    expect(await noted()).toEqual([]);
  });
});

describe('when the app is tested in an outer transaction', () => {
  it('is the session of the request there as well, and what it does outside is rolled back with the test', async () => {
    const test = testDatabase(knex);
    await test.begin();
    const answers = await serve(
      after(() => test.knex),
      '/order/book',
      '/order/pen',
      '/audit',
    );
    expect(answers.map(({ status }) => status)).toEqual([201, 500, 200]);
    const script = scopedSession(test.knex, { outside: 'autocommit' });
    await note(script, 'by a script');
    expect(await script('audit').orderBy('id').pluck('action')).toEqual(['order of book', 'took book', 'by a script']);
    await test.rollback();
    expect(await noted()).toEqual([]);
  });

  it('is a savepoint in a Knex.Transaction that stands for Knex', async () => {
    const outer = await knex.transaction();
    const inOuter = scopedSession(outer);
    const app = express()
      .use(sessionMiddleware(outer, { context: true }))
      .get('/:status', async (req, res) => {
        await inOuter.transaction((trx) => note(trx, req.params.status));
        req.session.afterCommit(async () => void (await note(inOuter, 'hook')));
        res.status(Number(req.params.status)).end();
      });
    expect((await serve(app, '/200', '/400')).map(({ status }) => status)).toEqual([200, 400]);
    expect(await outer('audit').orderBy('id').pluck('action')).toEqual(['200', 'hook']);
    await outer.rollback();
    expect(await noted()).toEqual([]);
  });
});
