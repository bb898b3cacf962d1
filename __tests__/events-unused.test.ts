import type { Request } from 'express';
import { withSession } from 'express-knex-session';
import { openSite } from './support/deadlines';
import { useEvents } from './support/events';
import { get, RawClient } from './support/http';
import { type Handler, insert, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred, isSql, spoil } from './support/wire';

/* After each test, useEvents() looks whether all that was acquired has settled: once, and in order. */
failOnWarnings();
const ledger = useLedger();
const events = useEvents();

const store: Handler = async (req, res) => {
  await insert(req, String(req.query['id'] ?? 'a'));
  res.sendStatus(201);
};

/** The holder needs its connection, however busy the machine is. */
const patience = (req: Request) => (req.path === '/hold' ? 5_000 : 30);

/** Requests of one site whose pool has a single connection: `/hold` has it until `release()`. */
async function onePlace(handler: Handler, options = {}) {
  const knex = ledger.pool({ pool: { min: 0, max: 1 } });
  const mayEnd = deferred();
  const site = await openSite(
    ledger,
    async (req, res, next) => {
      if (req.path !== '/hold') return handler(req, res, next);
      await insert(req, 'holder');
      await mayEnd.promise;
      return res.end();
    },
    { knex, ...options },
  );
  const holder = get(`${site.url}/hold`);
  await eventually(() => expect(events.order()).toEqual(['acquire', 'open']));
  return {
    site,
    isWaitedFor: () => eventually(() => expect(poolUsage(knex).pendingAcquires).toBe(1)),
    async release() {
      mayEnd.resolve();
      await holder;
    },
  };
}

describe('when a transaction gets no connection, it is told of by acquire and settled', () => {
  const unused = { outcome: 'unused', statements: 0, heldMs: undefined };

  it('if the pool is exhausted', async () => {
    const { site, release } = await onePlace(store, { acquireTimeout: patience });
    expect(await site.get()).toMatchObject({ status: 503 });
    const [settled] = await events.settled();
    expect(settled).toMatchObject({ ...unused, reason: 'error', error: { code: 'ERR_SESSION_UNAVAILABLE' } });
    expect(settled?.waitedMs).toBeGreaterThanOrEqual(29);
    await release();
  });

  it('if the handler answers all the same, later', async () => {
    let gaveUpAt = 0;
    const { site, release } = await onePlace(
      async (req, res) => {
        await insert(req, 'a').catch(() => {});
        gaveUpAt = performance.now();
        await new Promise((resolve) => setTimeout(resolve, 20));
        res.sendStatus(409);
      },
      { acquireTimeout: patience },
    );
    expect(await site.get()).toMatchObject({ status: 409 });
    const [settled] = await events.settled();
    expect(settled).toMatchObject({ ...unused, reason: 'response' });
    expect((settled?.startedAt as number) + (settled?.waitedMs as number)).toBeLessThanOrEqual(gaveUpAt);
    await release();
  });

  it('if the client leaves while it waits', async () => {
    const { site, isWaitedFor, release } = await onePlace(store);
    const client = (await RawClient.connect(site.port)).get('/');
    await isWaitedFor();
    await client.reset();
    expect(await events.settled()).toMatchObject([{ ...unused, reason: 'disconnect' }]);
    await release();
  });

  it('if drain() does not wait for it', async () => {
    const { site, isWaitedFor, release } = await onePlace(store);
    const asked = site.get();
    await isWaitedFor();
    const drained = site.sessions.drain(0);
    expect(await asked).toMatchObject({ status: 503 });
    await drained;
    const settled = await events.settled(2);
    expect(settled.find(({ outcome }) => outcome === 'unused')).toMatchObject({ ...unused, reason: 'shutdown' });
    await release();
  });

  it('if the database is not there', async () => {
    const site = await openSite(ledger, store, { knex: ledger.pool({ connection: 'postgres://127.0.0.1:1/none' }) });
    expect(await site.get()).toMatchObject({ status: 503 });
    expect(await events.settled()).toMatchObject([{ ...unused, reason: 'error', error: { code: 'ERR_SESSION_UNAVAILABLE' } }]);
  });
});

describe('when there is nothing to end, there is no settle', () => {
  it('if BEGIN is refused', async () => {
    const { knex, proxy } = await ledger.throughProxy();
    proxy.onFrontend((message) => {
      if (isSql(message, 'BEGIN;')) spoil(message);
      return undefined;
    });
    const site = await openSite(ledger, store, { knex });
    expect(await site.get()).toMatchObject({ status: 503 });
    expect(await events.settled()).toMatchObject([{ outcome: 'unused', reason: 'error', error: { code: 'ERR_SESSION_UNAVAILABLE' } }]);
    expect(events.order()).toEqual(['acquire', 'open', 'destroyed', 'settled']);
  });

  it('if its connection is killed between two statements', async () => {
    const site = await openSite(ledger, async (req, res) => {
      await insert(req, 'a');
      await ledger.killBackend();
      await insert(req, 'b');
      res.sendStatus(201);
    });
    expect(await site.get()).toMatchObject({ status: 500 });
    expect(await events.settled()).toMatchObject([{ outcome: 'rolled back', reason: 'error' }]);
    expect(events.order()).toEqual(['acquire', 'open', 'destroyed', 'settled']);
  });

  it('if its connection is killed during a statement', async () => {
    const site = await openSite(ledger, async (req, res) => {
      await insert(req, 'a');
      await req.session.raw('SELECT pg_terminate_backend(pg_backend_pid())');
      res.sendStatus(201);
    });
    expect(await site.get()).toMatchObject({ status: 500 });
    expect(await events.settled()).toMatchObject([{ outcome: 'rolled back', reason: 'error', statements: 2 }]);
    expect(events.order()).toEqual(['acquire', 'open', 'destroyed', 'settled']);
  });

  it('if a statement was given up by Knex', async () => {
    const site = await openSite(ledger, async (req, res) => {
      await insert(req, 'a');
      await req.session.raw('SELECT pg_sleep(0.1)').timeout(20);
      res.sendStatus(201);
    });
    expect(await site.get()).toMatchObject({ status: 500 });
    expect(await events.settled()).toMatchObject([{ outcome: 'rolled back', reason: 'error', error: { name: 'KnexTimeoutError' } }]);
    expect(events.order()).toEqual(['acquire', 'open', 'destroyed', 'settled']);
  });
});

describe('nothing is told', () => {
  it('of requests without a statement, and of sessions without a transaction', async () => {
    const site = await openSite(ledger, { routes: (app) => void app.get('/', (req, res) => void res.send(String(req.session.outcome))) });
    await site.get();
    const autocommit = await openSite(ledger, store, { transaction: false });
    expect(await autocommit.get()).toMatchObject({ status: 201 });
    const hooks = await openSite(ledger, (req, res) => {
      req.session.afterCommit(() => {});
      res.end();
    });
    await hooks.get();
    await withSession(ledger.knex, () => {});
    expect(events.told).toEqual([]);
  });

  it('of a session that was refused before it asked for a connection', async () => {
    const site = await openSite(ledger, store, { transactionTimeout: () => 'never' as never });
    expect(await site.get()).toMatchObject({ status: 500 });
    expect(events.told).toEqual([]);
  });
});
