import { getSession, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import createKnex from 'knex';
import { Pool } from 'pg';
import { openSite, rejection } from './support/deadlines';
import { get } from './support/http';
import { answerErrors, express5Flavour, type Handler, insert, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const ledger = useLedger();

const answer: Handler = async (req, res) => {
  await insert(req, String(req.query['id'] ?? 'a'));
  res.status(201).end();
};

/** A pool whose only connection is taken. */
async function takenPool(): Promise<{ knex: ReturnType<typeof ledger.pool>; give(): void }> {
  const knex = ledger.pool({ pool: { min: 0, max: 1 } });
  const held = await knex.client.acquireConnection();
  let isHeld = true;
  return {
    knex,
    give() {
      if (isHeld) knex.client.releaseConnection(held);
      isHeld = false;
    },
  };
}

describe('when no connection comes within acquireTimeout', () => {
  it('answers 503, and the cause names the option', async () => {
    const { knex, give } = await takenPool();
    const site = await openSite(ledger, answer, { knex, acquireTimeout: 100 });
    expect(await site.get()).toMatchObject({ status: 503, body: expect.stringContaining('ERR_SESSION_UNAVAILABLE') });
    expect(site.errors).toMatchObject([
      {
        name: 'SessionUnavailableError',
        code: 'ERR_SESSION_UNAVAILABLE',
        cause: { message: expect.stringContaining('100 ms (acquireTimeout)') },
      },
    ]);
    expect(site.sessions.stats()).toEqual({ open: 0, waiting: 0, committed: 0, rolledBack: 0, unknown: 0 });
    give();
  });

  it('gives a connection that comes late back at once, untouched, while the handler still runs', async () => {
    const { knex, give } = await takenPool();
    const statements: string[] = [];
    const goOn = deferred();
    const refused = deferred<unknown>();
    const site = await openSite(
      ledger,
      async (req) => {
        refused.resolve(await rejection(insert(req, 'a')));
        await goOn.promise;
        throw new Error('mine');
      },
      { knex, acquireTimeout: 50 },
    );
    const answered = site.get();
    await refused.promise;
    knex.on('query', ({ sql }) => statements.push(sql));
    give();
    await eventually(() => expect(poolUsage(knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 }));
    goOn.resolve();
    expect((await answered).status).toBe(500);
    expect(statements).toEqual([]);
  });

  it('tells all statements of the request the same, those that were issued together and those that come later', async () => {
    const { knex, give } = await takenPool();
    const told: any[] = [];
    const site = await openSite(
      ledger,
      async (req) => {
        const results = await Promise.allSettled([insert(req, 'a'), req.session.raw('SELECT 1'), req.session.transaction(async () => {})]);
        told.push(...results.map((result) => (result.status === 'rejected' ? result.reason : result)));
        give();
        told.push(await rejection(insert(req, 'late')));
        throw told[0];
      },
      { knex, acquireTimeout: 50 },
    );
    expect((await site.get()).status).toBe(503);
    expect(told).toHaveLength(4);
    expect(new Set(told).size).toBe(1);
    expect(site.errors[0]).toBe(told[0]);
    expect(await ledger.stored()).toEqual([]);
  });

  it('lets no success pass that swallows the error', async () => {
    const { knex, give } = await takenPool();
    const swallow: Handler = async (req, res) => {
      await insert(req, 'a').catch(() => {});
      res.status(201).send('stored');
    };
    const site = await openSite(ledger, swallow, { knex, acquireTimeout: 50 });
    expect(await site.get()).toMatchObject({ status: 503, body: expect.not.stringContaining('stored') });
    give();
  });

  it('serves the next request, and the same statement again, as soon as a connection is there', async () => {
    const { knex, give } = await takenPool();
    const site = await openSite(ledger, answer, { knex, acquireTimeout: 50 });
    expect((await site.get()).status).toBe(503);
    give();
    expect((await site.get()).status).toBe(201);
    expect(await ledger.stored()).toEqual(['a']);
  });

  it('serves those who can wait longer: the option is asked for each request', async () => {
    const { knex, give } = await takenPool();
    const site = await openSite(ledger, answer, { knex, acquireTimeout: (req) => (req.path === '/patient' ? 4_000 : 50) });
    const patient = get(`${site.url}/patient?id=patient`);
    await eventually(() => expect(site.sessions.stats().waiting).toBe(1));
    expect((await get(`${site.url}/hasty?id=hasty`)).status).toBe(503);
    expect(site.sessions.stats()).toMatchObject({ open: 0, waiting: 1 });
    give();
    expect((await patient).status).toBe(201);
    expect(site.sessions.stats()).toMatchObject({ open: 0, waiting: 0, committed: 1 });
    expect(await ledger.stored()).toEqual(['patient']);
  });

  it('says so for every one of a crowd, and leaves nobody in the queue of the pool', async () => {
    const { knex, give } = await takenPool();
    const site = await openSite(ledger, answer, { knex, acquireTimeout: 60 });
    const answers = await Promise.all(Array.from({ length: 30 }, () => site.get()));
    expect(answers.map(({ status }) => status)).toEqual(Array(30).fill(503));
    expect(site.sessions.stats().waiting).toBe(0);
    give();
    await eventually(() => expect(poolUsage(knex)).toMatchObject({ used: 0, pendingAcquires: 0 }));
    expect((await site.get()).status).toBe(201);
  });

  it('answers 503 when the event loop was busy for longer than that (Node 21 and later warn of timers that should have passed)', async () => {
    const { knex, give } = await takenPool();
    const busy: Handler = async (req, res) => {
      const stored = insert(req, 'a');
      stored.catch(() => {});
      await eventually(() => expect(poolUsage(knex).pendingAcquires).toBe(1));
      const until = performance.now() + 150;
      while (performance.now() < until);
      await stored;
      res.status(201).end();
    };
    const site = await openSite(ledger, busy, { knex, acquireTimeout: 100 });
    expect((await site.get()).status).toBe(503);
    give();
  });

  it('rejects withSession() with the same error, and its work may go on without the database', async () => {
    const { knex, give } = await takenPool();
    const call = withSession(knex, (session) => session.raw('SELECT 1'), { acquireTimeout: 50 });
    expect(await rejection(call)).toMatchObject({
      code: 'ERR_SESSION_UNAVAILABLE',
      cause: { message: expect.stringContaining('acquireTimeout') },
    });
    const swallowed = withSession(knex, async (session) => void (await session.raw('SELECT 1').catch(() => {})), { acquireTimeout: 50 });
    expect(await rejection(swallowed)).toMatchObject({ code: 'ERR_SESSION_UNAVAILABLE' });
    give();
  });
});

describe("when Knex's own limit for a connection is shorter", () => {
  it('answers 503 by that, with its error as cause', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 }, acquireConnectionTimeout: 400 });
    const held = await knex.client.acquireConnection();
    const site = await openSite(ledger, answer, { knex, acquireTimeout: 3_000 });
    expect((await site.get()).status).toBe(503);
    expect(site.errors).toMatchObject([{ code: 'ERR_SESSION_UNAVAILABLE', cause: { name: 'KnexTimeoutError' } }]);
    knex.client.releaseConnection(held);
    expect((await site.get()).status).toBe(201);
  });
});

describe('when the pool is a pg.Pool', () => {
  it('answers 503 in time, and gives the connection that comes late back to it', async () => {
    const pool = new Pool({ connectionString: ledger.database.url, max: 1 });
    const held = await pool.connect();
    const site = await openSite(ledger, answer, { knex: createKnex({ client: 'pg', connectionPool: pool }), acquireTimeout: 60 });
    expect((await site.get()).status).toBe(503);
    expect(site.errors).toMatchObject([{ code: 'ERR_SESSION_UNAVAILABLE', cause: { message: expect.stringContaining('acquireTimeout') } }]);
    held.release();
    await eventually(() => expect([pool.totalCount, pool.idleCount, pool.waitingCount]).toEqual([1, 1, 0]));
    expect((await site.get()).status).toBe(201);
    await pool.end();
  });
});

// Hazard 16.
describe('when a request waits for what it holds itself', () => {
  it('ends the wait of a second session on the same pool, and rolls the first back', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 } });
    const errors: any[] = [];
    const { url } = await ledger.serve(
      express5Flavour,
      (app) => {
        app.use(sessionMiddleware(knex, { property: 'second', acquireTimeout: 80 }));
        app.use(async (req, res) => {
          await insert(req, 'a');
          await getSession(req, 'second').raw('SELECT 1');
          res.status(201).end();
        });
      },
      { knex, errorHandlers: [sessionErrorHandler(), answerErrors(errors)] },
    );
    expect((await get(url)).status).toBe(503);
    expect(errors).toMatchObject([{ code: 'ERR_SESSION_UNAVAILABLE', cause: { message: expect.stringContaining('acquireTimeout') } }]);
    expect(await ledger.stored()).toEqual([]);
  });

  it('ends the wait of the root knex by the transaction of the request that holds its connection', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 } });
    let rows: unknown;
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        rows = await knex('notes').select();
        res.status(201).end();
      },
      { knex, transactionTimeout: 250 },
    );
    expect(await site.get()).toMatchObject({ status: 503, body: expect.stringContaining('ERR_SESSION_TIMEOUT') });
    // It has got the connection, and nothing of the request was stored.
    await eventually(() => expect(rows).toEqual([]));
  });

  it('does so for all, where each of them holds one and wants another', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 3 } });
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, String(req.query['id']));
        await knex('notes').select();
        res.status(201).end();
      },
      { knex, transactionTimeout: 120 },
    );
    const answers = await Promise.all([1, 2, 3].map((id) => get(`${site.url}/?id=${id}`)));
    expect(answers.some(({ status }) => status === 503)).toBe(true);
    expect(answers.every(({ status }) => status === 503 || status === 201)).toBe(true);
    expect(await ledger.stored()).toHaveLength(answers.filter(({ status }) => status === 201).length);
    expect((await get(`${site.url}/?id=after`)).status).toBe(201);
  });
});

describe('when the session is rolled back in the very moment in which its connection comes', () => {
  it('gives it back, in whichever order that happens', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 } });
    for (let steps = 0; steps < 40; steps++) {
      const held = await knex.client.acquireConnection();
      const coming = deferred();
      const call = withSession(knex, async (session) => {
        session.raw('SELECT 1').catch(() => {});
        await coming.promise;
        for (let step = 0; step < steps; step++) await null;
        throw new Error('mine');
      });
      await eventually(() => expect(poolUsage(knex).pendingAcquires).toBe(1));
      knex.client.releaseConnection(held);
      coming.resolve();
      expect((await rejection(call)).message).toBe('mine');
      await eventually(() => expect(poolUsage(knex)).toMatchObject({ used: 0, pendingAcquires: 0 }));
    }
  });
});
