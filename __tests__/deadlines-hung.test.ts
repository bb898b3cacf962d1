import type { Request } from 'express';
import { type SessionOptions, sessionErrorHandler } from 'express-knex-session';
import { expectNothingTold, never, openSite, rejection, type Site } from './support/deadlines';
import type { Answer } from './support/http';
import { answerErrors, express5Flavour, flavours, type Handler, insert, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

const timedOut = {
  status: 503,
  body: expect.stringContaining('"ERR_SESSION_TIMEOUT"'),
  headers: expect.objectContaining({ connection: 'close' }),
};

/** Where a handler stands that never answers. */
const hung: [string, (req: Request) => Promise<unknown>][] = [
  ['after a statement', (req) => insert(req, 'a')],
  ['in a statement', (req) => req.session.raw('SELECT pg_sleep(10)')],
  ['in its first statement, a stream that nobody reads', async (req) => void req.session.raw('SELECT generate_series(1, 9999)').stream()],
  ['after a statement that failed', (req) => req.session.raw('SELECT secret').catch(() => {})],
  ['in several statements', (req) => Promise.all([1, 2, 3].map(() => req.session.raw('SELECT pg_sleep(10)')))],
  ['behind a statement that was not awaited', async (req) => void req.session.raw('SELECT pg_sleep(10)').catch(() => {})],
  ['with a savepoint open', async (req) => (await req.session.transaction())('notes').insert({ id: 'a' })],
  ['in a savepoint', (req) => req.session.transaction(() => never())],
  ['in a statement in a savepoint', (req) => req.session.transaction((trx) => trx.raw('SELECT pg_sleep(10)'))],
  [
    'in a savepoint that waits for one of the session itself, which waits for it',
    (req) => req.session.transaction(() => req.session.transaction(async (trx) => trx('notes').insert({ id: 'a' }))),
  ],
  ['after setRollbackOnly()', (req) => insert(req, 'a').then(() => req.session.setRollbackOnly())],
  [
    'in a statement inside a loop over a stream of the session',
    async (req) => {
      for await (const row of req.session.raw('SELECT generate_series(1, 5000) AS i').stream()) {
        await req.session('notes').insert({ id: String((row as { i: number }).i) });
      }
    },
  ],
];

/** What a request leaves behind that had to be given up. */
async function expectGone(site: Site): Promise<void> {
  expect(site.errors).toMatchObject([{ name: 'SessionTimeoutError', code: 'ERR_SESSION_TIMEOUT', status: 503 }]);
  expect(site.errors[0].message).toContain('60 ms (transactionTimeout)');
  await eventually(() => expect(site.sessions.stats()).toEqual({ open: 0, waiting: 0, committed: 0, rolledBack: 1, unknown: 0 }));
  await ledger.isClean();
  expect(await ledger.stored()).toEqual([]);
}

describe.each(flavours)('when a handler never answers, on $version', (flavour) => {
  const ask = async (handler: Handler, options: SessionOptions = {}): Promise<[Answer, Site]> => {
    const site = await openSite(ledger, handler, { flavour, transactionTimeout: 60, ...options });
    return [await site.get(), site];
  };

  // What differs between them is how an error comes to the error handlers.
  it.each(flavour === express5Flavour ? hung : hung.slice(0, 3))(
    'answers 503, rolls back and gives the connection back: %s',
    async (_where, work) => {
      const [answer, site] = await ask(async (req) => {
        await work(req);
        await never();
      });
      expect(answer).toMatchObject(timedOut);
      await expectGone(site);
      expect(site.reported).toEqual([]);
      expect(poolUsage(ledger.knex).free).toBeGreaterThan(0);
    },
  );

  it.each(['end', 'finish'] as const)("does so with commitAt: '%s', if nothing was sent", async (commitAt) => {
    const [answer, site] = await ask(
      async (req) => {
        await insert(req, 'a');
        await never();
      },
      { commitAt },
    );
    expect(answer).toMatchObject(timedOut);
    await expectGone(site);
  });

  it("cuts the connection with commitAt: 'end', if something was sent", async () => {
    const [answer, site] = await ask(
      async (req, res) => {
        await insert(req, 'a');
        res.write('half of it');
        await never();
      },
      { commitAt: 'end', transactionTimeout: 200 },
    );
    expect(answer).toMatchObject({ status: 200, body: 'half of it', complete: false, error: { code: 'ECONNRESET' } });
    expect(site.errors).toEqual([]);
    expect(site.reported).toMatchObject([{ code: 'ERR_SESSION_TIMEOUT' }]);
    await ledger.isClean();
    expect(await ledger.stored()).toEqual([]);
  });

  it("cuts the connection with commitAt: 'finish', if something was sent", async () => {
    const [answer, site] = await ask(
      async (req, res) => {
        await insert(req, 'a');
        res.write('half of it');
        await never();
      },
      { commitAt: 'finish', transactionTimeout: 200 },
    );
    expect(answer).toMatchObject({ body: 'half of it', complete: false });
    expect(site.reported).toMatchObject([{ code: 'ERR_SESSION_TIMEOUT' }]);
    expect(await ledger.stored()).toEqual([]);
  });

  it('takes back the status, headers and cookies that the handler had prepared', async () => {
    const [{ headers, status }] = await ask(async (req, res) => {
      await insert(req, 'a');
      res.status(201).location('/secret').cookie('signed-in', 'yes').set('Cache-Control', 'public').set('Content-Length', '7');
      await never();
    });
    expect(status).toBe(503);
    expect(Object.keys(headers)).not.toEqual(expect.arrayContaining([expect.stringMatching(/location|set-cookie|cache-control/)]));
    expect(headers['content-length']).not.toBe('7');
  });

  it('takes back a head that was written, and has not left', async () => {
    const [answer, site] = await ask(async (req, res) => {
      await insert(req, 'a').catch(() => {});
      res.writeHead(201, { Location: '/secret', 'Content-Length': 7 });
      await never();
    });
    expect(answer).toMatchObject(timedOut);
    expect(answer.headers).not.toHaveProperty('location');
    await expectGone(site);
  });

  it('answers by Express if the app has no error handlers, with no secret in it', async () => {
    const site = await openSite(ledger, (req) => insert(req, 'secret').then(never), {
      flavour,
      transactionTimeout: 60,
      errorHandlers: () => [],
    });
    const answer = await site.get();
    expect(answer).toMatchObject({ status: 503, headers: { connection: 'close' }, complete: true });
    expect(answer.body).not.toMatch(/secret|insert/i);
    await ledger.isClean();
  });

  it('answers by error handlers that know nothing of sessions', async () => {
    const errorHandlers = (errors: any[]) => [answerErrors(errors)];
    const site = await openSite(ledger, (req) => insert(req, 'a').then(never), { flavour, transactionTimeout: 60, errorHandlers });
    expect(await site.get()).toMatchObject(timedOut);
    await expectGone(site);
  });

  it('waits for an error handler that takes its time, after the connection is back', async () => {
    let used: number | undefined;
    const site = await openSite(ledger, (req) => insert(req, 'a').then(never), {
      flavour,
      transactionTimeout: 60,
      errorHandlers: (errors) => [
        sessionErrorHandler(),
        async (error: any, _req: Request, res: Parameters<Handler>[1], _next: unknown) => {
          errors.push(error);
          used = poolUsage(ledger.knex).used;
          // As one that logs to a database would.
          await ledger.knex.raw('SELECT 1');
          res.status(error.status).json({ code: error.code });
        },
      ],
    });
    expect(await site.get()).toMatchObject(timedOut);
    expect(used).toBe(0);
    await expectGone(site);
  });
});

describe('when the time has passed', () => {
  it('aborts session.signal, ends the statement that runs with the same error, and refuses others by name', async () => {
    const told: { signal?: AbortSignal; running?: any; waiting?: any; later?: any; doomed?: any; savepoint?: any } = {};
    const site = await openSite(
      ledger,
      async (req) => {
        told.signal = req.session.signal;
        const running = req.session.raw('SELECT pg_sleep(10)');
        const waiting = insert(req, 'secret');
        [told.running, told.waiting] = await Promise.all([rejection(running), rejection(waiting)]);
        told.later = await rejection(insert(req, 'secret'));
        told.savepoint = await rejection(req.session.transaction(async () => {}));
        told.doomed = await rejection(Promise.resolve().then(() => req.session.setRollbackOnly()));
        throw told.later;
      },
      { transactionTimeout: 60 },
    );
    expect(await site.get()).toMatchObject(timedOut);
    await eventually(() => expect(told.doomed).toBeDefined());
    const reason = told.signal?.reason;
    expect(told.signal?.aborted).toBe(true);
    expect(told.running).toBe(reason);
    expect(reason).toMatchObject({ code: 'ERR_SESSION_TIMEOUT', cause: { code: '57014' } });
    for (const refused of [told.waiting, told.later, told.savepoint, told.doomed]) {
      if (refused === reason) continue;
      expect(refused).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('See `cause`') });
      expect(refused.cause).toBe(reason);
    }
    expectNothingTold(...Object.values(told));
    expect(site.errors).toEqual([reason]);
  });

  it('answers though whoever listens to the signal ends the session himself', async () => {
    const site = await openSite(
      ledger,
      async (req) => {
        await insert(req, 'a');
        req.session.signal.addEventListener('abort', () => void req.session.rollback().catch(() => {}));
        await never();
      },
      { transactionTimeout: 60 },
    );
    expect(await site.get()).toMatchObject(timedOut);
    await expectGone(site);
  });

  it('answers with the error though whoever listens to the signal answers with a success', async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        req.session.signal.addEventListener('abort', () => void res.status(201).send('stored'));
        await never();
      },
      { transactionTimeout: 60 },
    );
    expect(await site.get()).toMatchObject({ status: 503, body: expect.stringContaining('ERR_SESSION_TIMEOUT') });
    await expectGone(site);
  });

  it('counts from the connection, not from the beginning of the request', async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await new Promise((resolve) => setTimeout(resolve, 250));
        await insert(req, 'a');
        res.status(201).end();
      },
      { transactionTimeout: 200 },
    );
    expect((await site.get()).status).toBe(201);
  });

  it('has no meaning for a request that has committed, whatever it does then', async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        await req.session.commit();
        await new Promise((resolve) => setTimeout(resolve, 250));
        res.status(201).end();
      },
      { transactionTimeout: 200 },
    );
    expect((await site.get()).status).toBe(201);
    expect(await ledger.stored()).toEqual(['a']);
  });

  it('never comes with transactionTimeout: 0, and is asked for each request', async () => {
    const slow: Handler = async (req, res) => {
      await insert(req, String(req.query['id'] ?? 'a'));
      await new Promise((resolve) => setTimeout(resolve, 120));
      res.status(201).end();
    };
    const site = await openSite(ledger, slow, { transactionTimeout: (req) => (req.query['id'] === 'limited' ? 60 : 0) });
    const [unlimited, limited] = await Promise.all(
      ['unlimited', 'limited'].map((id) => fetch(`${site.url}/?id=${id}`, { signal: AbortSignal.timeout(4_000) })),
    );
    expect([unlimited?.status, limited?.status]).toEqual([201, 503]);
    expect(await ledger.stored()).toEqual(['unlimited']);
  });
});
