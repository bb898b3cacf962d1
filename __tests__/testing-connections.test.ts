import express from 'express';
import { getSession, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import { testDatabase as createKit, type TestDatabase } from 'express-knex-session/testing';
import createKnex, { type Knex } from 'knex';
import { Pool } from 'pg';
import { get, type Listening, listen, post } from './support/http';
import { answerError, caught, insert, Ledger, UNCHANGED } from './support/knex';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { startWireProxy } from './support/wire-proxy';

failOnWarnings();
const ledger = Ledger.forTests();
// Knex warns of each connection that it takes out of its pool.
const log = { warn() {}, error() {}, debug() {}, deprecate() {} };

/** Whose tests end even if an expectation has failed: the next ones shall not suffer from it. */
const kits: TestDatabase[] = [];
function kitOn(original: Knex): TestDatabase {
  const kit = createKit(original);
  kits.push(kit);
  return kit;
}
afterEach(async () => {
  for (const { rollback } of kits.splice(0)) await rollback().catch(() => {});
});

const SLEEP = 'select pg_sleep(20)';
const names = (knex: Knex) => knex('people').orderBy('name').pluck('name');
const pidOf = async (knex: Knex): Promise<number> => (await knex.raw('select pg_backend_pid() as pid')).rows[0].pid;
const kill = (pid: number) => ledger.admin.raw('select pg_terminate_backend(?, 5000)', [pid]);

/** Waits until the server is at work on this statement. */
const isRunning = (sql: string) =>
  eventually(async () => expect(await ledger.admin('pg_stat_activity').where({ state: 'active', query: sql })).toHaveLength(1));

async function timed(promise: Promise<unknown>): Promise<number> {
  const start = performance.now();
  await promise;
  return performance.now() - start;
}

/** A test after all that has gone wrong, on the same kit. */
async function expectAnotherTestWorks({ knex, begin, rollback }: TestDatabase, original: Knex): Promise<void> {
  await begin();
  await insert(knex, 'another test');
  await withSession(knex, async (session) => insert(session, 'its session'));
  expect(await names(knex)).toEqual([...UNCHANGED, 'another test', 'its session']);
  await rollback();
  expect(await names(ledger.admin)).toEqual(UNCHANGED);
  const pools = [knex, original].filter(({ client }) => 'numUsed' in client.pool);
  for (const pool of pools) expect(poolUsage(pool)).toMatchObject({ used: 0, pendingAcquires: 0 });
}

const originals: Record<string, () => Knex> = {
  'a pool of Knex': () => ledger.connect({ log }),
  'a pool of one connection': () => ledger.connect({ log, pool: { min: 1, max: 1 } }),
  'a function that tells the connection': () => ledger.connect({ log, connection: async () => ({ connectionString: ledger.url }) }),
  'a pool of pg': () => {
    const connectionPool = new Pool({ connectionString: ledger.url });
    pools.push(connectionPool);
    // Not by the ledger, which looks for leaks in pools of Knex.
    return createKnex({ client: 'pg', log, connectionPool } as Knex.Config);
  },
};
const pools: Pool[] = [];
afterEach(async () => {
  for (const pool of pools.splice(0)) {
    const { idleCount, totalCount } = pool;
    // It waits for those that are lent.
    if (idleCount === totalCount) await pool.end();
    expect(idleCount).toBe(totalCount);
  }
});

describe.each(Object.entries(originals))('when the application has %s', (_name, connect) => {
  it('rolls tests back, one after the other (69)', async () => {
    const original = connect();
    const kit = kitOn(original);
    for (let i = 0; i < 3; i++) await expectAnotherTestWorks(kit, original);
    // Statements of the test while a transaction of its own has its turn elsewhere: one waits for the other.
    await kit.begin();
    const transactions = ['a', 'b', 'c'].map((name) => kit.knex.transaction(async (trx) => insert(trx, name)));
    await Promise.all([...transactions, insert(kit.knex, 'd')]);
    expect(await names(kit.knex)).toEqual([...UNCHANGED, 'a', 'b', 'c', 'd']);
    await kit.rollback();
  });

  it.each(['a statement', 'a transaction', 'a session'])(
    'fails %s whose backend is killed in the middle of it, with the error of the server, and the next test works (69)',
    async (how) => {
      const original = connect();
      const kit = kitOn(original);
      const { knex } = kit;
      await kit.begin();
      const first = await pidOf(knex);
      await insert(knex, 'lost');
      const works: Record<string, () => Promise<unknown>> = {
        'a statement': async () => knex.raw(SLEEP),
        'a transaction': () => knex.transaction(async (trx) => [await insert(trx, 'x'), await trx.raw(SLEEP)]),
        'a session': () => withSession(knex, async (session) => [await insert(session, 'x'), await session.raw(SLEEP)]),
      };
      const work = caught(works[how]?.() as Promise<unknown>);
      await isRunning(SLEEP);
      await kill(first);

      // Knex puts the error of its ROLLBACK in place of the first one.
      expect(await work).toMatchObject(how === 'a transaction' ? { message: expect.stringContaining('terminated') } : { code: '57P01' });
      expect(await caught(knex('people'))).toBeInstanceOf(Error);
      expect(await timed(kit.rollback())).toBeLessThan(2_000);
      await expectAnotherTestWorks(kit, original);
      await kit.begin();
      expect(await pidOf(knex)).not.toBe(first);
      await kit.rollback();
    },
  );

  it('fails what comes after its backend was killed between two statements, and the next test works', async () => {
    const original = connect();
    const kit = kitOn(original);
    await kit.begin();
    const trx = await kit.knex.transaction();
    await insert(trx, 'x');
    await kill(await pidOf(trx));

    expect(await caught(insert(trx, 'y'))).toBeInstanceOf(Error);
    await caught(trx.rollback());
    await caught(trx.executionPromise);
    expect(await timed(kit.rollback())).toBeLessThan(2_000);
    await expectAnotherTestWorks(kit, original);
  });
});

describe('when the application prepares its connections', () => {
  it("finds them prepared: searchPath, afterCreate, and the driver's options", async () => {
    await ledger.admin.raw('create schema other; create table other.things (n integer)');
    const created: unknown[] = [];
    const afterCreate = (connection: any, done: (error?: Error) => void) => {
      created.push(connection);
      connection.query("set app.name = 'prepared'", done);
    };
    const kit = kitOn(ledger.connect({ searchPath: ['other', 'public'], pool: { min: 0, max: 3, afterCreate } }));
    await kit.begin();
    await kit.knex('things').insert({ n: 1 });
    await kit.knex.transaction(async (trx) => insert(trx, 'x'));
    expect((await kit.knex.raw("select current_setting('app.name') as name")).rows).toEqual([{ name: 'prepared' }]);
    await kit.rollback();
    expect(created).toHaveLength(1);
    expect(await ledger.admin('other.things')).toEqual([]);
  });
});

describe('when several kits are at work at once', () => {
  it('shows none the work of another, on one database (as two workers of Jest have it)', async () => {
    const kits = [1, 2, 3].map(() => kitOn(ledger.connect()));
    const shared = ledger.connect();
    kits.push(kitOn(shared), kitOn(shared));
    await Promise.all(kits.map(({ begin }) => begin()));
    await Promise.all(kits.map(({ knex }, i) => withSession(knex, async (session) => insert(session, `of ${i}`))));
    expect(await Promise.all(kits.map(({ knex }) => names(knex)))).toEqual(kits.map((_, i) => [...UNCHANGED, `of ${i}`]));
    await kits[0]?.rollback();
    expect(await names(kits[1]?.knex as Knex)).toContain('of 1');
    await Promise.all(kits.slice(1).map(({ rollback }) => rollback()));
    expect(await names(ledger.admin)).toEqual(UNCHANGED);
  });
});

describe('when an application is tested', () => {
  let server: Listening | undefined;
  afterEach(() => server?.close());

  it('rolls back what a request has stored in two databases', async () => {
    const kits = ['one', 'other'].map((property) => ({ property, ...kitOn(ledger.connect()) }));
    const app = express();
    for (const { property, knex } of kits) app.use(sessionMiddleware(knex, { property }));
    app.post('/:name', async (req, res) => {
      for (const { property } of kits) await insert(getSession(req, property), `${property} ${req.params.name}`);
      res.sendStatus(req.params.name === 'bad' ? 400 : 201);
    });
    server = await listen(app);
    for (const { begin } of kits) await begin();
    const statuses = [];
    for (const name of ['x', 'bad', 'y']) statuses.push((await post(`${server.url}/${name}`)).status);
    expect(statuses).toEqual([201, 400, 201]);
    for (const { property, knex } of kits) expect(await names(knex)).toEqual([...UNCHANGED, `${property} x`, `${property} y`].sort());
    for (const { rollback } of kits) await rollback();
    expect(await names(ledger.admin)).toEqual(UNCHANGED);
  });

  it('counts and drains its sessions as in production', async () => {
    const run = async (knex: Knex, running: () => Promise<unknown>) => {
      const sessions = sessionMiddleware(knex);
      const app = express()
        .use(sessions)
        .get('/:name', async (req, res) => {
          await insert(getSession(req), req.params.name);
          if (req.params.name === 'sleep') await getSession(req).raw(SLEEP);
          res.sendStatus(req.params.name === 'bad' ? 400 : 201);
        })
        .use(sessionErrorHandler(), answerError);
      const served = await listen(app);
      const ask = async (name: string) => (await get(`${served.url}/${name}`)).status;
      const told: unknown[] = [await ask('x'), await ask('bad'), sessions.stats()];
      const sleeping = ask('sleep');
      await running();
      told.push(sessions.stats());
      await sessions.drain(10);
      told.push(await sleeping, sessions.stats(), await ask('y'), await names(knex));
      await served.close();
      return told;
    };
    const plain = await run(ledger.knex, () => isRunning(SLEEP));
    await ledger.reset();
    const { knex, begin, rollback } = kitOn(ledger.knex);
    await begin();
    const tested = await run(knex, () => isRunning(SLEEP));
    await rollback();
    expect(tested).toEqual(plain);
    expect(plain.at(-1)).toEqual([...UNCHANGED, 'x']);
  });
});

describe('when a connection of the kit is destroyed in mid-statement', () => {
  const ways: Record<string, (knex: Knex, connection: any) => unknown> = {
    'by Knex': (knex, connection) => knex.client.destroyRawConnection(connection),
    'by its socket': (_knex, connection) => connection.connection.stream.destroy(),
    'by its end()': (_knex, connection) => connection.end(),
  };

  it.each(Object.entries(ways))('rolls its work back, gives its turn on, and leaves the pool: %s', async (_name, destroy) => {
    const original = ledger.connect({ log });
    const kit = kitOn(original);
    await kit.begin();
    const trx = await kit.knex.transaction();
    await insert(trx, 'lost');
    const connection = await trx.client.acquireConnection();
    const sleeping = caught(trx.raw(SLEEP));
    await isRunning(SLEEP);
    const next = insert(kit.knex, 'next');

    await destroy(kit.knex, connection);
    await next;
    expect(await sleeping).toMatchObject({ message: expect.stringContaining('Connection terminated') });
    expect(await names(kit.knex)).toEqual([...UNCHANGED, 'next']);
    expect(await caught(insert(trx, 'after'))).toBeInstanceOf(Error);
    await caught(trx.rollback());
    await caught(trx.executionPromise);
    await eventually(() => expect(poolUsage(kit.knex)).toMatchObject({ used: 0 }));
    await kit.rollback();
    await expectAnotherTestWorks(kit, original);
  });

  it('does so for a session whose COMMIT takes longer than settleTimeout', async () => {
    const kit = kitOn(ledger.connect({ log }));
    await kit.begin();
    await kit.knex.raw(`
      create function linger() returns trigger language plpgsql as $$ begin perform pg_sleep(20); return null; end $$;
      create constraint trigger linger after insert on payments deferrable initially deferred for each row execute function linger()`);
    const work = withSession(kit.knex, (session) => session('payments').insert({ person_id: 1, amount: 1 }), {
      settleTimeout: 50,
      onError() {},
    });
    expect(await caught(work)).toMatchObject({ code: 'ERR_COMMIT_UNKNOWN' });
    expect(await kit.knex('payments')).toEqual([]);
    await insert(kit.knex, 'next');
    await kit.rollback();
  });

  it('never lends one again that the application has ended', async () => {
    const { knex, begin, rollback } = kitOn(ledger.connect({ log }));
    await begin();
    const connection = await knex.client.acquireConnection();
    await connection.end();
    knex.client.releaseConnection(connection);
    expect(await names(knex)).toEqual(UNCHANGED);
    await rollback();
  });
});

describe('when the network is slow, or dead', () => {
  it('lets a late cancel hit nothing but the statement that it was for', async () => {
    const proxy = await startWireProxy(ledger.url);
    const original = ledger.connect({ connection: proxy.url });
    const { knex, begin, rollback } = kitOn(original);
    await begin();
    const { promise: release, resolve: letGo } = withResolvers();
    const { promise: isSent, resolve: markSent } = withResolvers();
    proxy.onFrontend(({ type }) => {
      if (type !== 'CancelRequest') return undefined;
      markSent();
      return release;
    });
    const timedOut = caught(knex.raw('select pg_sleep(0.2)').timeout(50, { cancel: true }));
    const next = knex.raw('select pg_sleep(0.1)').then(() => insert(knex, 'next'));
    await isSent;
    // By now the first would have ended by itself, and the second would be at work.
    await ledger.admin.raw('select pg_sleep(0.25)');
    letGo();
    expect(await timedOut).toMatchObject({ name: 'KnexTimeoutError' });
    await next;
    expect(await names(knex)).toEqual([...UNCHANGED, 'next']);
    await rollback();
    await original.destroy();
    await proxy.close();
  });

  it('ends rollback() within the time that a hook of Jest has, and the next test works', async () => {
    const proxy = await startWireProxy(ledger.url);
    const original = ledger.connect({ connection: proxy.url, log });
    const kit = kitOn(original);
    await kit.begin();
    const sleeping = caught(kit.knex.raw(SLEEP));
    await isRunning(SLEEP);
    proxy.pause();
    expect(await timed(kit.rollback().catch(() => {}))).toBeLessThan(4_500);
    expect(await sleeping).toBeInstanceOf(Error);
    proxy.cut();
    proxy.resume();
    await expectAnotherTestWorks(kit, original);
    await original.destroy();
    await proxy.close();
  });
});

function withResolvers() {
  let resolve = () => {};
  const promise = new Promise<void>((settle) => {
    resolve = settle;
  });
  return { promise, resolve };
}
