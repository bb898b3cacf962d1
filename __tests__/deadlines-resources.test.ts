import { AsyncLocalStorage, createHook } from 'node:async_hooks';
import { setTimeout as sleep } from 'node:timers/promises';
import { withSession } from 'express-knex-session';
import { never, openSite, timers } from './support/deadlines';
import { get, RawClient } from './support/http';
import { type Handler, insert, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const ledger = useLedger();

/** Long enough to be seen if one is left. */
const limits = { acquireTimeout: 60_000, transactionTimeout: 60_000, settleTimeout: 60_000 };

const ends: [string, Handler, object?][] = [
  ['a success', (req, res) => insert(req, 'a').then(() => res.end())],
  ['a refusal', (req, res) => insert(req, 'a').then(() => res.sendStatus(409))],
  ['a throw', (req) => insert(req, 'a').then(() => Promise.reject(new Error('mine')))],
  [
    'a throw beside a statement that is cancelled',
    (req) => Promise.all([req.session.raw('SELECT pg_sleep(10)'), Promise.reject(new Error('mine'))]),
  ],
  ['a COMMIT that fails', (req, res) => insert(req, 'a', 'fail').then(() => res.end())],
  ['a COMMIT whose connection is lost', (req, res) => insert(req, 'a', 'die').then(() => res.end())],
  [
    'commit() by hand',
    (req, res) =>
      insert(req, 'a')
        .then(() => req.session.commit())
        .then(() => res.end()),
  ],
  [
    'rollback() by hand',
    (req, res) =>
      insert(req, 'a')
        .then(() => req.session.rollback())
        .then(() => res.end()),
  ],
  [
    'a stream that was left half read',
    async (req, res) => {
      for await (const _row of req.session.raw('SELECT generate_series(1, 9999)').stream()) break;
      res.end();
    },
  ],
  ['a transaction that has timed out', (req) => insert(req, 'a').then(never), { transactionTimeout: 30 }],
  ['a statement that has timed out', (req) => req.session.raw('SELECT pg_sleep(10)'), { transactionTimeout: 30 }],
  ['a function of an option that gives nonsense', (req) => insert(req, 'a'), { settleTimeout: () => -1 }],
];

describe('when a request has ended', () => {
  it.each(ends)('has left no timer behind: %s', async (_end, handler, options = {}) => {
    const site = await openSite(ledger, handler, { ...limits, ...options });
    // The pool's own timers, and those of sockets, are there after the first.
    await site.get();
    await ledger.isClean();
    const before = timers();
    await Promise.all([site.get(), site.get()]);
    await ledger.isClean();
    await eventually(() => expect(timers()).toBeLessThanOrEqual(before));
  });

  it('has left none behind of a wait for a connection that was given up', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 }, acquireConnectionTimeout: 400 });
    const held = await knex.client.acquireConnection();
    const site = await openSite(ledger, (req) => insert(req, 'a'), { knex, ...limits, acquireTimeout: 30 });
    await site.get();
    await eventually(() => expect(poolUsage(knex).pendingAcquires).toBe(0));
    const before = timers();
    await Promise.all([site.get(), site.get()]);
    await eventually(() => expect(timers()).toBeLessThanOrEqual(before));
    knex.client.releaseConnection(held);
  });

  it('has left none behind of a client that has gone', async () => {
    const site = await openSite(ledger, (req) => req.session.raw('SELECT pg_sleep(10)'), limits);
    const leave = async () => {
      const client = (await RawClient.connect(site.port)).get('/');
      await eventually(() => expect(site.sessions.stats().open).toBe(1));
      await client.reset();
      await eventually(() => expect(site.sessions.stats().open).toBe(0));
    };
    await leave();
    await ledger.isClean();
    const before = timers();
    await leave();
    await leave();
    await eventually(() => expect(timers()).toBeLessThanOrEqual(before));
  });

  it('has left none behind of withSession(), however it ends', async () => {
    const works = [
      async () => 'unused',
      (session: any) => session.raw('SELECT 1'),
      (session: any) => session.raw('SELECT nonsense'),
      (session: any) => session.raw('SELECT pg_sleep(10)'),
    ];
    const run = () => Promise.allSettled(works.map((work) => withSession(ledger.knex, work, { ...limits, transactionTimeout: 50 })));
    await run();
    await ledger.isClean();
    const before = timers();
    await run();
    await eventually(() => expect(timers()).toBeLessThanOrEqual(before));
  });

  it('has left none behind of drain()', async () => {
    const site = await openSite(ledger, (req, res) => insert(req, 'a').then(() => res.end()), limits);
    await site.get();
    const before = timers();
    await site.sessions.drain(60_000);
    expect(timers()).toBeLessThanOrEqual(before);
  });

  it('keeps nothing of the error handlers of requests whose clients have gone', async () => {
    const running = () => (globalThis as any)[Symbol.for('express-knex-session.errorHandlers')].running as number;
    const site = await openSite(ledger, (req) => req.session.raw('SELECT pg_sleep(10)'));
    const client = (await RawClient.connect(site.port)).get('/');
    await eventually(() => expect(site.sessions.stats().open).toBe(1));
    await client.reset();
    await eventually(() => expect(site.errors).toHaveLength(1));
    await eventually(() => expect(running()).toBe(0));
  });
});

describe('while sessions are open', () => {
  it('has one timer for all limits that are far away, in the context of none of them', async () => {
    const storage = new AsyncLocalStorage<string>();
    const contexts: unknown[] = [];
    const hook = createHook({
      init: (_id, type) => {
        if (type === 'Timeout') contexts.push(storage.getStore());
      },
    });
    const work = deferred();
    // That of the tests before has ended.
    await sleep(100);
    const open = Array.from({ length: 5 }, (_, i) =>
      storage.run(`request ${i}`, () =>
        withSession(
          ledger.knex,
          async (session) => {
            await session.raw('SELECT 1');
            await work.promise;
          },
          limits,
        ),
      ),
    );
    await eventually(() => expect(poolUsage(ledger.knex).used).toBe(5));
    await sleep(100);
    const before = timers();
    hook.enable();
    await sleep(200);
    hook.disable();
    const sleeping = 1;
    expect(contexts.length - sleeping).toBeGreaterThan(0);
    expect(contexts.length - sleeping).toBeLessThan(6);
    expect(new Set(contexts)).toEqual(new Set([undefined]));
    work.resolve();
    await Promise.all(open);
    await eventually(() => expect(timers()).toBeLessThan(before));
  });
});

describe('while a session is not used', () => {
  it('has no timer, whatever the options say', async () => {
    let made: number | undefined;
    const touch: Handler = (req, res) => {
      const before = timers();
      void req.session.signal;
      void req.session('notes').where({ id: 'a' });
      req.session.setRollbackOnly();
      made = timers() - before;
      res.send(req.session.outcome);
    };
    const site = await openSite(ledger, touch, limits);
    expect((await site.get()).body).toBe('unused');
    expect(made).toBe(0);
  });

  it('asks no function of the request for its limits', async () => {
    const asked = jest.fn(() => 1_000);
    const site = await openSite(ledger, (_req, res) => void res.end(), {
      acquireTimeout: asked,
      transactionTimeout: asked,
      settleTimeout: asked,
      onDisconnect: () => {
        asked();
        return 'finish';
      },
    });
    expect((await site.get()).status).toBe(200);
    expect(asked).not.toHaveBeenCalled();
  });
});

describe('while a session is used', () => {
  it('has one timer at a time: however many statements and streams it runs', async () => {
    const seen: number[] = [];
    const site = await openSite(
      ledger,
      async (req, res) => {
        const before = timers();
        for (let i = 0; i < 5; i++) {
          await insert(req, `${req.path} ${i}`);
          for await (const _row of req.session.raw('SELECT generate_series(1, 20)').stream());
          seen.push(timers() - before);
        }
        res.end();
      },
      limits,
    );
    await site.get();
    seen.length = 0;
    expect((await get(`${site.url}/again`)).status).toBe(200);
    expect(seen).toHaveLength(5);
    expect(Math.max(...seen)).toBeLessThanOrEqual(1);
  });
});
