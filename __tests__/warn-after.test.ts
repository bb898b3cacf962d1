import { setTimeout as delay } from 'node:timers/promises';
import express, { type RequestHandler, Router } from 'express';
import { retryable, SessionOpenLongError, type SessionOptions, sessionMiddleware, sessionOptions, withSession } from 'express-knex-session';
import { openSite } from './support/deadlines';
import { useEvents } from './support/events';
import { get, RawClient } from './support/http';
import { flavours, type Handler, insert, useLedger } from './support/ledger';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();
const events = useEvents();

const linger = (ms = 60) => delay(ms);
const lingering: Handler = async (req, res) => {
  await insert(req, 'secret');
  await linger();
  res.sendStatus(201);
};

/** The line of this file on which a marked statement is. */
function lineOf(error: SessionOpenLongError): string | undefined {
  return /warn-after\.test\.ts:(\d+):\d+/.exec(error.stack ?? '')?.[1];
}

describe.each(flavours)('on $version, when a transaction is open for longer than warnAfter', (flavour) => {
  it('tells onError once, with the route, the time, and the last statement without its values', async () => {
    const site = await openSite(
      ledger,
      { routes: (app) => void app.get('/reports/:id', flavour.route(lingering)) },
      { flavour, warnAfter: 20 },
    );
    expect(await get(`${site.url}/reports/7?token=secret`)).toMatchObject({ status: 201 });
    expect(site.reported).toHaveLength(1);
    const [error] = site.reported;
    expect(error).toBeInstanceOf(SessionOpenLongError);
    expect(error).toMatchObject({
      name: 'SessionOpenLongError',
      code: 'ERR_SESSION_OPEN_LONG',
      route: 'GET /reports/:id',
      statement: 'insert into "notes" ("at_commit", "id") values (?, ?)',
    });
    expect(error.message).toMatch(/^GET \/reports\/:id has had its transaction open for \d+ ms, .*\(warnAfter: 20\)/);
    expect(error.ms).toBeGreaterThanOrEqual(19);
    expect(error.ms).toBeLessThanOrEqual((await events.settled())[0]?.heldMs as number);
    expect(error.stack).toContain('insert into "notes"');
    expect(JSON.stringify(error) + error.stack + error.message).not.toContain('secret');
    expect(await ledger.stored()).toEqual(['secret']);
  });

  it('tells the channel the same, with the transaction that settles later', async () => {
    const site = await openSite(ledger, lingering, { flavour, warnAfter: 20 });
    await site.get();
    const [settled] = await events.settled();
    expect(events.order()).toEqual(['acquire', 'open', 'long', 'settle', 'settled']);
    const [long] = events.long();
    expect(long?.error).toBe(site.reported[0]);
    expect(long?.transaction).toBe(events.told[0]?.message);
    expect([long?.session, long?.request]).toEqual([settled?.session, settled?.request]);
    expect(settled).toMatchObject({ outcome: 'committed', reason: 'response', error: undefined });
  });

  it('names the path of a router, and of a request without a route', async () => {
    const router = Router().get(['/reports/:id', '/other'], flavour.route(lingering) as RequestHandler);
    const site = await openSite(
      ledger,
      {
        routes(app) {
          app.use(
            '/api',
            flavour.version === 'Express 5' ? router : (flavour.express.Router().get('/reports/:id', flavour.route(lingering)) as Router),
          );
          app.use(flavour.route(lingering) as RequestHandler);
        },
      },
      { flavour, warnAfter: 20 },
    );
    await get(`${site.url}/api/reports/7`);
    await ledger.database.admin('notes').del();
    await get(`${site.url}/nowhere/7?token=secret`);
    expect(site.reported.map(({ route }) => route)).toEqual([expect.stringMatching(/^GET \/api\/reports\/:id/), 'GET /nowhere/7']);
  });
});

describe('warnAfter', () => {
  it.each([-1, Number.NaN, '20', 2 ** 31, null])('is refused at construction if it is %p', (warnAfter) => {
    const message = /^Expected `warnAfter` to be .*, or 0 for never, .*got/;
    expect(() => sessionMiddleware(ledger.knex, { warnAfter: warnAfter as never })).toThrow(TypeError);
    expect(() => sessionMiddleware(ledger.knex, { warnAfter: warnAfter as never })).toThrow(message);
    expect(() => sessionOptions({ warnAfter: warnAfter as never })).toThrow(message);
    return expect(withSession(ledger.knex, () => {}, { warnAfter: warnAfter as never })).rejects.toThrow(message);
  });

  it('refuses the first statement if a function of it gives a wrong value', async () => {
    const site = await openSite(ledger, lingering, { warnAfter: () => -1 });
    expect(await site.get()).toMatchObject({ status: 500 });
    expect(site.errors).toMatchObject([{ message: expect.stringContaining('`warnAfter`') }]);
    expect(await ledger.stored()).toEqual([]);
  });

  it('may be a function of the request', async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, req.path);
        await linger(40);
        res.end();
      },
      { warnAfter: (req) => (req.path === '/slow' ? 0 : 20) },
    );
    await Promise.all(['/slow', '/quick'].map((path) => get(site.url + path)));
    expect(site.reported.map(({ route }) => route)).toEqual(['GET /quick']);
    expect(lineOf(site.reported[0])).toBeDefined();
  });

  it.each<[SessionOptions, SessionOptions, number]>([
    [{}, {}, 0],
    [{ warnAfter: 0 }, {}, 0],
    [{}, { warnAfter: 20 }, 1],
    [{ warnAfter: 20 }, { warnAfter: 0 }, 0],
    [{ warnAfter: 1_000 }, { warnAfter: 20 }, 1],
  ])('%p, with %p for a route: told of %i times', async (options, own, times) => {
    const site = await openSite(
      ledger,
      { routes: (app) => void app.get('/', sessionOptions(own as never), lingering as RequestHandler) },
      options,
    );
    expect(await site.get()).toMatchObject({ status: 201 });
    expect(site.reported).toHaveLength(times);
    if (times > 0) expect(lineOf(site.reported[0])).toBeDefined();
  });

  it('with sessionOptions() on a retryable route: each attempt has its stack', async () => {
    let attempts = 0;
    const handler = retryable(async (req, res) => {
      await insert(req, 'a', attempts++ === 0 ? 'conflict' : undefined);
      await linger(40);
      res.sendStatus(201);
    });
    const site = await openSite(ledger, { routes: (app) => void app.get('/', sessionOptions({ warnAfter: 20 }), handler) });
    expect(await site.get()).toMatchObject({ status: 201 });
    expect(site.reported.map((error) => lineOf(error) !== undefined)).toEqual([true, true]);
  });

  it('says nothing after the end, and counts neither the wait for the pool nor the time after commit()', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 } });
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        await req.session.commit();
        await linger(120);
        res.end();
      },
      { warnAfter: 100, knex },
    );
    let asked!: Promise<unknown>;
    await knex.transaction(async (trx) => {
      await trx.raw('SELECT 1');
      asked = site.get();
      await eventually(() => expect(events.order()).toEqual(['acquire']));
      await linger(120);
    });
    await asked;
    expect(site.reported).toEqual([]);
  });

  it('tells the time with the connection, without the wait for it', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 } });
    const site = await openSite(ledger, lingering, { warnAfter: 20, knex });
    let asked!: Promise<unknown>;
    await knex.transaction(async (trx) => {
      await trx.raw('SELECT 1');
      asked = site.get();
      await eventually(() => expect(events.order()).toEqual(['acquire']));
      await linger(100);
    });
    await asked;
    const [settled] = await events.settled();
    expect(settled?.waitedMs).toBeGreaterThanOrEqual(99);
    expect(site.reported[0].ms).toBeLessThanOrEqual(settled?.heldMs as number);
  });

  it('does not end the transaction, nor replace transactionTimeout', async () => {
    const site = await openSite(ledger, (req) => req.session.raw('SELECT pg_sleep(10)'), {
      warnAfter: 20,
      transactionTimeout: 60,
    });
    const begun = performance.now();
    expect(await site.get()).toMatchObject({ status: 503 });
    expect(performance.now() - begun).toBeLessThan(5_000);
    expect(site.reported).toMatchObject([{ code: 'ERR_SESSION_OPEN_LONG', statement: 'SELECT pg_sleep(10)' }]);
    const [settled] = await events.settled();
    expect(settled).toMatchObject({ reason: 'timeout' });
    expect(settled?.heldMs).toBeGreaterThanOrEqual(59);
  });

  it('tells once of each transaction of a session', async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        await linger(40);
        await req.session.checkpoint();
        await linger(40);
        await insert(req, 'b');
        await linger(60);
        res.end();
      },
      { warnAfter: 20 },
    );
    await site.get();
    expect(site.reported).toHaveLength(2);
    expect(site.reported.map((error) => lineOf(error) !== undefined)).toEqual([true, true]);
    expect(events.order()).toEqual(Array(2).fill(['acquire', 'open', 'long', 'settle', 'settled']).flat());
  });

  it("tells of a stream, too, with commitAt: 'end'", async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        for await (const _ of req.session.raw('SELECT generate_series(1, 5)').stream()) {
          res.write('x');
          await linger(10);
        }
        res.end();
      },
      { warnAfter: 20, commitAt: 'end' },
    );
    expect(await site.get()).toMatchObject({ body: 'xxxxx', complete: true });
    expect(site.reported).toMatchObject([{ statement: 'SELECT generate_series(1, 5)' }]);
  });

  it('tells of a client that has gone where the handler may finish', async () => {
    const site = await openSite(ledger, lingering, { warnAfter: 20, onDisconnect: 'finish' });
    const client = (await RawClient.connect(site.port)).get('/');
    await eventually(() => expect(events.told.at(-1)?.message).toMatchObject({ statements: 1 }));
    await client.reset();
    expect(await events.settled()).toMatchObject([{ outcome: 'committed' }]);
    expect(site.reported).toHaveLength(1);
  });

  it("without onError, tells Knex's logger once", async () => {
    const logged: string[] = [];
    const knex = ledger.pool({ log: { error: (message: string) => void logged.push(message), warn() {} } });
    const app = express().use(sessionMiddleware(knex, { warnAfter: 20 }), lingering as RequestHandler);
    await get((await ledger.listen(app)).url);
    expect(logged).toHaveLength(1);
    expect(logged[0]).toMatch(/^SessionOpenLongError: GET \/ has had .*\n {4}Last statement: insert into "notes" .*\n {4}at /);
    expect(logged[0]).not.toContain('secret');
  });

  it('does not ask for the options again, in its timer', async () => {
    const settings: Record<string, string> = { 'app.a': 'x' };
    const told: unknown[] = [];
    const options = { settings, warnAfter: 20, onError: (error: unknown) => void told.push(error) };
    await withSession(
      ledger.knex,
      async (session) => {
        await session.raw('SELECT 1');
        settings['app.a'] = undefined as never;
        await linger();
      },
      options,
    );
    expect(told).toEqual([expect.any(SessionOpenLongError)]);
  });

  it('goes on if onError throws', async () => {
    const logged: string[] = [];
    const knex = ledger.pool({ log: { error: (message: string) => void logged.push(message), warn() {} } });
    const onError = (): never => {
      throw new Error('of onError');
    };
    const app = express().use(sessionMiddleware(knex, { warnAfter: 20, onError }), lingering as RequestHandler);
    expect(await get((await ledger.listen(app)).url)).toMatchObject({ status: 201 });
    expect(logged).toHaveLength(2);
    expect(events.long()).toHaveLength(1);
  });
});
