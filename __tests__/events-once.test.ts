import { retryable, sessionChannels, withSession } from 'express-knex-session';
import { testDatabase } from 'express-knex-session/testing';
import { never, openSite } from './support/deadlines';
import { useEvents } from './support/events';
import { get } from './support/http';
import { type Handler, insert, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';
import { deferred, isSql } from './support/wire';

/* After each test, useEvents() looks whether all that was acquired has settled: once, and in order. */
failOnWarnings();
const ledger = useLedger();
const events = useEvents();

const store: Handler = async (req, res) => {
  await insert(req, String(req.query['id'] ?? 'a'));
  res.sendStatus(201);
};

describe('each transaction is told of', () => {
  it('that is given up during its first statement, before BEGIN was answered: with settle, as its ROLLBACK is sent', async () => {
    const { knex, proxy } = await ledger.throughProxy();
    const site = await openSite(ledger, (req) => req.session.raw('SELECT pg_sleep(10)'), { knex, transactionTimeout: 40 });
    expect(await site.get()).toMatchObject({ status: 503 });
    const [settled] = await events.settled();
    expect(proxy.sql()).toContain('ROLLBACK');
    expect(settled).toMatchObject({ outcome: 'rolled back', reason: 'timeout', decision: 'rollback' });
    expect(events.order()).toEqual(['acquire', 'open', 'settle', 'settled']);
  });

  it("of each attempt of a retryable handler, with the attempt's session", async () => {
    let attempts = 0;
    const handler = retryable(async (req, res) => {
      await insert(req, 'a', attempts++ < 2 ? 'conflict' : undefined);
      res.status(201).send('stored');
    });
    const site = await openSite(ledger, { routes: (app) => void app.get('/', handler) });
    expect(await site.get()).toMatchObject({ status: 201 });
    const settled = await events.settled(3);
    expect(settled.map(({ outcome, reason, error, bytesHeld }) => [outcome, reason, (error as any)?.code, bytesHeld])).toEqual([
      ['rolled back', 'error', '40001', 6],
      ['rolled back', 'error', '40001', 6],
      ['committed', 'response', undefined, 6],
    ]);
    expect(new Set(settled.map(({ session }) => session)).size).toBe(3);
    expect(new Set(settled.map(({ request }) => request)).size).toBe(1);
    expect(settled[2]?.session).toBe(settled[2]?.request?.session);
  });

  it('that a statement has ended by itself, unseen: nobody knows its outcome', async () => {
    const { knex, proxy } = await ledger.throughProxy();
    const harmless = 'show a';
    proxy.onFrontend(({ bytes }) => {
      const start = bytes.indexOf(harmless);
      if (start >= 0) bytes.write('commit', start);
      return undefined;
    });
    const site = await openSite(ledger, (req) => insert(req, 'a').then(() => req.session.raw(harmless)), { knex });
    expect(await site.get()).toMatchObject({ status: 500 });
    expect(await events.settled()).toMatchObject([{ outcome: 'unknown', reason: 'error', error: { code: 'ERR_TRANSACTION_CONTROL' } }]);
  });

  it('counted by stats() when that is told', async () => {
    const counts: unknown[] = [];
    const site = await openSite(ledger, store);
    const listener = () => void counts.push(site.sessions.stats());
    sessionChannels.settled.subscribe(listener);
    await site.get();
    sessionChannels.settled.unsubscribe(listener);
    expect(counts).toEqual([{ open: 0, waiting: 0, committed: 1, rolledBack: 0, unknown: 0 }]);
  });

  it('of a hook, with the request that it is a hook of', async () => {
    let inHook: unknown;
    const site = await openSite(ledger, async (req, res) => {
      await insert(req, 'a');
      req.session.afterCommit(async (session) => {
        inHook = session;
        await session('notes').insert({ id: 'b' });
      });
      res.sendStatus(201);
    });
    await get(`${site.url}/path`);
    const [first, hook] = await events.settled(2);
    expect([first?.request?.path, hook?.request]).toEqual(['/path', first?.request]);
    expect(hook).toMatchObject({ outcome: 'committed', reason: 'response', bytesHeld: 0 });
    expect(hook?.session).toBe(inHook);
    expect(hook?.session).not.toBe(first?.session);
  });

  it('of a hook that rolls back', async () => {
    const site = await openSite(ledger, async (req, res) => {
      await insert(req, 'a');
      req.session.afterCommit(async (session) => {
        await session('notes').insert({ id: 'b' });
        throw new Error('mine');
      });
      res.sendStatus(201);
    });
    await site.get();
    expect((await events.settled(2))[1]).toMatchObject({ outcome: 'rolled back', reason: 'error', error: { message: 'mine' } });
  });

  it.each([
    ['committed', 'response', undefined, async () => {}],
    ['rolled back', 'error', { message: 'mine' }, () => Promise.reject(new Error('mine'))],
    ['rolled back', 'timeout', { code: 'ERR_SESSION_TIMEOUT' }, never],
  ] as const)('of withSession(), without a request: %s, %s', async (outcome, reason, error, end) => {
    let given: unknown;
    const work = withSession(
      ledger.knex,
      async (session) => {
        given = session;
        await session('notes').insert({ id: 'a' });
        await end();
      },
      { transactionTimeout: end === never ? 50 : 5_000 },
    );
    await work.catch(() => {});
    const [settled] = await events.settled();
    expect(settled).toMatchObject({ outcome, reason, request: undefined, statements: 1, bytesHeld: 0 });
    if (error) expect(settled?.error).toMatchObject(error);
    expect(settled?.session).toBe(given);
  });

  it('of a hook in withSession(), without a request', async () => {
    await withSession(ledger.knex, async (session) => {
      await session('notes').insert({ id: 'a' });
      session.afterCommit((session) => session('notes').insert({ id: 'b' }));
    });
    expect(await events.settled(2)).toMatchObject(Array(2).fill({ request: undefined, outcome: 'committed' }));
  });

  it('that begins with a savepoint: once, and with the id of the session', async () => {
    const site = await openSite(ledger, async (req, res) => {
      await req.session.transaction((outer) => outer.transaction((inner) => inner('notes').insert({ id: 'a' })));
      await insert(req, 'b');
      res.sendStatus(201);
    });
    let id: string | undefined;
    ledger.knex.once('query', ({ __knexTxId }) => {
      id = __knexTxId;
    });
    expect(await site.get()).toMatchObject({ status: 201 });
    const [settled] = await events.settled();
    expect(settled).toMatchObject({ id, outcome: 'committed', session: expect.any(Function) });
    expect(settled?.session).toBe(settled?.request?.session);
  });

  it('that only reads, and whose COMMIT nobody waits for: when that was answered', async () => {
    const { knex, proxy } = await ledger.throughProxy();
    const mayCommit = deferred();
    proxy.onFrontend((message) => (isSql(message, 'COMMIT;') ? mayCommit.promise : undefined));
    const site = await openSite(ledger, async (req, res) => res.json(await req.session('notes')), { knex, readOnly: true });
    expect(await site.get()).toMatchObject({ status: 200 });
    expect(events.order()).toEqual(['acquire', 'open', 'settle']);
    await new Promise((resolve) => setTimeout(resolve, 20));
    mayCommit.resolve();
    const [settled] = await events.settled();
    expect(settled).toMatchObject({ outcome: 'committed', reason: 'response', bytesHeld: 2 });
    expect(settled?.heldMs).toBeGreaterThanOrEqual(15);
  });

  it('that only reads, and whose COMMIT is not answered: destroyed, then settled', async () => {
    const { knex, proxy } = await ledger.throughProxy();
    proxy.onFrontend((message) => {
      if (isSql(message, 'COMMIT;')) proxy.cut();
      return undefined;
    });
    const site = await openSite(ledger, async (req, res) => res.json(await req.session('notes')), { knex, readOnly: true });
    expect(await site.get()).toMatchObject({ status: 200 });
    await events.settled();
    expect(events.order()).toEqual(['acquire', 'open', 'settle', 'destroyed', 'settled']);
    expect(site.reported).toHaveLength(1);
  });

  it("in pg's pipeline mode", async () => {
    const knex = ledger.pool({ connection: { connectionString: ledger.database.url, pipeline: true } as never });
    const site = await openSite(
      ledger,
      async (req, res) => {
        await Promise.all(['a', 'b', 'c'].map((id) => insert(req, id)));
        res.sendStatus(201);
      },
      { knex },
    );
    expect(await site.get()).toMatchObject({ status: 201 });
    expect(await events.settled()).toMatchObject([{ outcome: 'committed', statements: 3 }]);
  });

  it("in pg's pipeline mode, when the second of three fails", async () => {
    const knex = ledger.pool({ connection: { connectionString: ledger.database.url, pipeline: true } as never });
    const site = await openSite(
      ledger,
      async (req) => {
        await Promise.all(['a', 'a', 'c'].map((id) => insert(req, id)));
      },
      { knex },
    );
    expect(await site.get()).toMatchObject({ status: 500 });
    expect(await events.settled()).toMatchObject([{ outcome: 'rolled back', reason: 'error', error: { code: '23505' } }]);
  });

  it('in a Knex.Transaction that stands for Knex', async () => {
    await ledger.knex.transaction(async (trx) => {
      await withSession(trx, async (session) => {
        await session('notes').insert({ id: 'a' });
        await session('notes').where({ id: 'a' }).del();
      });
      await withSession(trx, (session) =>
        session('notes')
          .insert({ id: 'b' })
          .then(() => Promise.reject(new Error('mine'))),
      ).catch(() => {});
    });
    expect(await events.settled(2)).toMatchObject([
      { outcome: 'committed', decision: 'commit', statements: 2 },
      { outcome: 'rolled back', decision: 'rollback', statements: 1, reason: 'error' },
    ]);
    expect(events.destroyed()).toEqual([]);
  });

  it('in a Knex.Transaction that has ended', async () => {
    const trx = await ledger.knex.transaction();
    await trx.rollback();
    await withSession(trx, (session) => session('notes').insert({ id: 'a' })).catch(() => {});
    expect(await events.settled()).toMatchObject([{ outcome: 'unused', reason: 'error' }]);
  });

  it('of a test', async () => {
    const database = testDatabase(ledger.knex);
    await database.begin();
    const site = await openSite(ledger, store, { knex: database.knex });
    expect(await site.get()).toMatchObject({ status: 201 });
    expect(await events.settled()).toMatchObject([{ outcome: 'committed', reason: 'response', statements: 1 }]);
    expect(await ledger.stored()).toEqual([]);
    await database.rollback();
  });
});
