import { setTimeout as sleep } from 'node:timers/promises';
import { type Outcome, type Session, withSession } from 'express-knex-session';
import createKnex, { type Knex } from 'knex';
import { Pool } from 'pg';
import { openSite, rejection } from './support/deadlines';
import { get } from './support/http';
import { type Handler, insert, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred, ended, isSql } from './support/wire';
import type { WireProxy } from './support/wire-proxy';

failOnWarnings();
// Before the ledger looks for what is left.
const buried: (() => void)[] = [];
afterEach(() => {
  for (const end of buried.splice(0)) end();
});

const ledger = useLedger();
const one = { min: 0, max: 1 };
const mine = Object.assign(new Error('mine'), { status: 418, code: 'MINE' });

/** From the moment in which this is sent, the network swallows everything on that connection, and every cancel. */
function swallowFrom(proxy: WireProxy, sql: string): Promise<void> {
  const swallowed = deferred();
  const end = deferred<'cut-before'>();
  buried.push(() => end.resolve('cut-before'));
  let dead: number | undefined;
  proxy.onFrontend((message) => {
    if (dead === undefined && isSql(message, sql)) {
      dead = message.connection;
      swallowed.resolve();
    }
    return message.connection === dead || message.type === 'CancelRequest' ? end.promise : undefined;
  });
  return swallowed.promise;
}

/** Makes a pool of one connection behind a proxy. */
type MakePool = () => Promise<{ knex: Knex; proxy: WireProxy; close?: () => Promise<void>; used(): number }>;

const pools: [string, MakePool][] = [
  [
    "Knex's pool",
    async () => {
      const { knex, proxy } = await ledger.throughProxy({ pool: one });
      return { knex, proxy, used: () => poolUsage(knex).used };
    },
  ],
  [
    "Knex's pool, and pg's pipeline mode",
    async () => {
      const { proxy } = await ledger.throughProxy();
      const knex = ledger.pool({ pool: one, connection: { connectionString: proxy.url, pipeline: true } as never });
      return { knex, proxy, used: () => poolUsage(knex).used };
    },
  ],
  [
    'a pg.Pool',
    async () => {
      const { proxy } = await ledger.throughProxy();
      const pool = new Pool({ connectionString: proxy.url, max: 1 });
      const knex = createKnex({ client: 'pg', connectionPool: pool });
      return { knex, proxy, close: () => pool.end(), used: () => pool.totalCount - pool.idleCount };
    },
  ],
];

describe.each(pools)('on a dead network, with %s', (_name, makePool) => {
  let made: Awaited<ReturnType<MakePool>>;
  beforeEach(async () => {
    made = await makePool();
    // One connection is open.
    await made.knex.raw('SELECT 1');
  });
  afterEach(() => made.close?.());
  const options = { settleTimeout: 100, transactionTimeout: 1_000 };
  const next: Handler = async (req, res) => {
    await insert(req, 'next');
    res.status(201).end();
  };
  /** The first request runs the handler, the others, which wait for its connection, are innocent. */
  const site = async (handler: Handler, more: object = {}) => {
    const { knex, proxy } = made;
    const opened = await openSite(ledger, (req, ...rest) => (req.path === '/' ? handler : next)(req, ...rest), {
      knex,
      ...options,
      ...more,
    });
    return Object.assign(opened, { knex, proxy });
  };

  it('calls a COMMIT unknown that gets no answer, and frees the slot at once', async () => {
    let outcome: Outcome | undefined;
    const { proxy, ...app } = await site(async (req, res) => {
      res.once('close', () => {
        outcome = req.session.outcome;
      });
      await insert(req, 'a');
      res.status(201).send('stored');
    });
    const committing = swallowFrom(proxy, 'COMMIT;');
    const answer = app.get();
    await committing;
    const waiting = get(`${app.url}/next`);
    expect(await answer).toMatchObject({ status: 500, body: expect.stringContaining('"ERR_COMMIT_UNKNOWN"') });
    expect((await waiting).status).toBe(201);
    expect(app.errors).toMatchObject([
      { code: 'ERR_COMMIT_UNKNOWN', cause: { message: expect.stringContaining('100 ms (settleTimeout)') } },
    ]);
    expect(outcome).toBe('unknown');
    expect(app.sessions.stats()).toEqual({ open: 0, waiting: 0, committed: 1, rolledBack: 0, unknown: 1 });
    expect(made.used()).toBe(0);
  });

  it("keeps the app's error if ROLLBACK gets no answer, tells onError, and frees the slot at once", async () => {
    const { proxy, ...app } = await site(async (req) => {
      await insert(req, 'a');
      throw mine;
    });
    const rollingBack = swallowFrom(proxy, 'ROLLBACK');
    const answer = app.get();
    await rollingBack;
    const waiting = get(`${app.url}/next`);
    expect(await answer).toMatchObject({ status: 418, body: expect.stringContaining('MINE') });
    expect((await waiting).status).toBe(201);
    expect(app.errors).toEqual([mine]);
    expect(app.reported).toMatchObject([{ message: expect.stringContaining('settleTimeout'), cause: mine }]);
    expect(made.used()).toBe(0);
    await eventually(async () => expect(await ledger.stored()).toEqual(['next']));
  });

  it('ends a statement that gets no answer, with the error that has given it up', async () => {
    let told: any;
    const { proxy, ...app } = await site(
      async (req) => {
        await insert(req, 'a');
        told = await rejection(req.session.raw('SELECT 1 AS gone'));
        throw told;
      },
      { transactionTimeout: 150 },
    );
    const running = swallowFrom(proxy, 'SELECT 1 AS gone');
    const answer = app.get();
    await running;
    const waiting = get(`${app.url}/next`);
    expect(await answer).toMatchObject({ status: 503, body: expect.stringContaining('"ERR_SESSION_TIMEOUT"') });
    expect((await waiting).status).toBe(201);
    await eventually(() => expect(told).toMatchObject({ code: 'ERR_SESSION_TIMEOUT' }));
    expect(app.errors).toEqual([told]);
    expect(made.used()).toBe(0);
  });

  it("does not wait for it if the app's error comes meanwhile", async () => {
    const { proxy, ...app } = await site(async (req) => {
      await insert(req, 'a');
      req.session.raw('SELECT 1 AS gone').catch(() => {});
      await sleep(20);
      throw mine;
    });
    const running = swallowFrom(proxy, 'SELECT 1 AS gone');
    const answer = app.get();
    await running;
    expect(await answer).toMatchObject({ status: 418 });
    expect((await get(`${app.url}/next`)).status).toBe(201);
    expect(app.reported).toMatchObject([{ message: expect.stringContaining('settleTimeout') }]);
  });

  it('ends the wait of a commit for it', async () => {
    const { proxy, ...app } = await site(
      async (req, res) => {
        await insert(req, 'a');
        req.session.raw('SELECT 1 AS gone').catch(() => {});
        res.status(201).send('stored');
      },
      { transactionTimeout: 150 },
    );
    const running = swallowFrom(proxy, 'SELECT 1 AS gone');
    const answer = app.get();
    await running;
    expect(await answer).toMatchObject({ status: 503, body: expect.stringContaining('"ERR_SESSION_TIMEOUT"') });
    expect((await get(`${app.url}/next`)).status).toBe(201);
    await eventually(async () => expect(await ledger.stored()).toEqual(['next']));
  });
});

describe('when the network dies under withSession()', () => {
  const limits = { transactionTimeout: 100, settleTimeout: 100 };
  const works: [string, (session: Session, die: () => void) => Promise<unknown>][] = [
    [
      'under a stream that was left half read, before COMMIT',
      async (session, die) => {
        for await (const _row of session.raw('SELECT generate_series(1, 100000) AS i').stream()) {
          die();
          break;
        }
      },
    ],
    [
      'under a stream that is being read',
      async (session, die) => {
        for await (const _row of session.raw('SELECT generate_series(1, 100000) AS i').stream()) die();
      },
    ],
    [
      'in a savepoint',
      (session, die) =>
        session.transaction(async (trx) => {
          await trx.raw('SELECT 1');
          die();
          await trx.raw('SELECT 2');
        }),
    ],
    [
      'before the end of a savepoint',
      (session, die) =>
        session.transaction(async (trx) => {
          await trx.raw('SELECT 1');
          die();
        }),
    ],
    [
      'under a statement that was not awaited',
      async (session, die) => {
        await session.raw('SELECT 1');
        die();
        session.raw('SELECT 2').catch(() => {});
      },
    ],
  ];

  it.each(works)('rejects within the limits, and gives the connection back: %s', async (_where, work) => {
    const { knex, proxy } = await ledger.throughProxy({ pool: one });
    await knex.raw('SELECT 1');
    expect(await rejection(withSession(knex, (session) => work(session, () => proxy.pause()), limits))).toMatchObject({
      code: 'ERR_SESSION_TIMEOUT',
    });
    expect(poolUsage(knex).used).toBe(0);
    // A fresh connection: the old ones never come back.
    proxy.cut();
    proxy.resume();
    expect((await withSession(knex, (session) => session.raw('SELECT 1 AS alive'))).rows).toEqual([{ alive: 1 }]);
  });

  it.each(works)('does so in a Knex.Transaction, whose connection is not ours to destroy: %s', async (_where, work) => {
    const { knex, proxy } = await ledger.throughProxy({ pool: one });
    const outer = await knex.transaction();
    const gone = ended(await outer.client.acquireConnection());
    expect(await rejection(withSession(outer, (session) => work(session, () => proxy.pause()), limits))).toBeInstanceOf(Error);
    // Who owns it finds it dead, and not busy with a statement of ours for ever.
    proxy.cut();
    await gone;
    proxy.resume();
    expect(await rejection(outer.raw('SELECT 1'))).toBeInstanceOf(Error);
    await outer.rollback().catch(() => {});
  });

  it('rejects commit() by hand as unknown, and leaves no statement without an end', async () => {
    const { knex, proxy } = await ledger.throughProxy({ pool: one });
    let outcome: Outcome | undefined;
    let later: any;
    const call = withSession(
      knex,
      async (session) => {
        await session('notes').insert({ id: 'a' });
        const committed = swallowFrom(proxy, 'COMMIT;');
        const commit = rejection(session.commit());
        await committed;
        later = await rejection(session.raw('SELECT 1'));
        const error = await commit;
        outcome = session.outcome;
        throw error;
      },
      limits,
    );
    expect(await rejection(call)).toMatchObject({
      code: 'ERR_COMMIT_UNKNOWN',
      cause: { message: expect.stringContaining('settleTimeout') },
    });
    expect(outcome).toBe('unknown');
    expect(later).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    expect(poolUsage(knex).used).toBe(0);
  });
});
