import express, { type Request, type RequestHandler, type Response, Router } from 'express';
import { currentSession, retryable, sessionErrorHandler, sessionMiddleware, sessionOptions } from 'express-knex-session';
import { openSite, timers } from './support/deadlines';
import { get, keepAliveAgent, post, RawClient } from './support/http';
import { answerErrors, insert, useLedger } from './support/ledger';
import { eventually } from './support/pool';
import { conflict, retrying, store, transient } from './support/retrying';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const ledger = useLedger();

const serve = retrying(ledger);

describe('when the client leaves, or the application is drained', () => {
  /** A first attempt whose ROLLBACK waits for the test, and what comes after it. */
  async function rollingBack() {
    const { knex, proxy } = await ledger.throughProxy();
    await knex.raw('SELECT 1');
    const reached = deferred();
    const goOn = deferred();
    proxy.onFrontend((message) => {
      if (!message.text.startsWith('ROLLBACK')) return undefined;
      reached.resolve();
      return goOn.promise;
    });
    const site = await serve(
      async (req, res, _next, attempt) => {
        await store(req, attempt);
        if (attempt === 1) throw transient();
        res.json({ attempt });
      },
      { knex },
    );
    const gone = new Promise((resolve) => site.server.on('connection', (socket) => socket.once('close', resolve)));
    return { site, knex, reached: reached.promise, gone, goOn: goOn.resolve };
  }

  it('begins no further attempt for a client that has left after the first one, and nothing is held', async () => {
    const { site, knex, reached, gone, goOn } = await rollingBack();
    const before = timers();
    const client = (await RawClient.connect(site.port)).get('/');
    await reached;
    await client.reset();
    await gone;
    goOn();
    await ledger.isClean(knex);
    // The pause is over.
    await eventually(() => expect(timers()).toBeLessThanOrEqual(before));
    expect([site.ran(), site.errors, site.reported]).toEqual([1, [], []]);
    expect(await ledger.stored()).toEqual([]);
    expect(site.sessions.stats()).toMatchObject({ open: 0, waiting: 0, committed: 0, rolledBack: 1 });
  });

  it("begins none with onDisconnect: 'finish' either, and the error goes to the error handlers", async () => {
    const isThere = deferred();
    const left = deferred();
    const site = await serve(
      async (req, res, _next, attempt) => {
        await conflict(req, attempt);
        res.once('close', left.resolve);
        isThere.resolve();
        await left.promise;
        res.json({ attempt });
      },
      { onDisconnect: 'finish' },
    );
    const client = (await RawClient.connect(site.port)).get('/');
    await isThere.promise;
    await client.reset();
    await eventually(() => expect(site.errors).toEqual([expect.objectContaining({ code: '40001' })]));
    expect(site.ran()).toBe(1);
    await ledger.isClean();
  });

  it('gives a client that leaves in the last attempt up, as in any', async () => {
    const isWaiting = deferred();
    const left = deferred<unknown>();
    const site = await serve(async (req, _res, _next, attempt) => {
      await store(req, attempt);
      if (attempt === 1) throw transient();
      req.session.signal.onabort = () => left.resolve(attempt);
      isWaiting.resolve();
      await req.session.raw('SELECT pg_sleep(10)');
    });
    const client = (await RawClient.connect(site.port)).get('/');
    await isWaiting.promise;
    await client.reset();
    expect(await left.promise).toBe(2);
    await ledger.isClean();
    expect(site.ran()).toBe(2);
    expect(await ledger.stored()).toEqual([]);
  });

  it('answers 503 once it is drained, and drain() does not wait for the pause', async () => {
    const { site, reached, goOn } = await rollingBack();
    const answer = site.get();
    await reached;
    const drained = site.sessions.drain(3_000);
    goOn();
    await drained;
    expect(await answer).toMatchObject({ status: 503, complete: true, body: expect.stringContaining('ERR_SESSION_UNAVAILABLE') });
    expect(await ledger.stored()).toEqual([]);
  });
});

describe('when the body has not been read', () => {
  it.each([
    ['a length', { 'Content-Length': 4 }],
    ['chunks', { 'Transfer-Encoding': 'chunked' }],
  ])('is refused before the handler runs, and the connection goes on: %s', async (_name, headers) => {
    const site = await serve(async (req, res, _next, attempt) => void res.json(await store(req, attempt)));
    const agent = keepAliveAgent();
    const refused = await post(site.url, 'text', { agent, headers: { 'Content-Type': 'text/plain', ...headers } });
    expect(refused).toMatchObject({ status: 500, body: expect.stringContaining('ERR_NOT_RETRYABLE') });
    expect(site.ran()).toBe(0);
    for (const body of [{ a: 1 }, undefined, '']) {
      await ledger.database.admin('notes').del();
      expect(await post(site.url, body, { agent })).toMatchObject({ status: 200 });
    }
    expect(site.ran()).toBe(3);
    agent.destroy();
  });
});

describe('when retryable() is given what it cannot use', () => {
  const handler: RequestHandler = () => {};
  const mistakes: [string, unknown[], RegExp][] = [
    ['no handler', [], /`handler`.*undefined/],
    ['a list', [[handler]], /`handler`/],
    ['an error handler', [(_error: unknown, _req: unknown, _res: unknown, _next: unknown) => {}], /`handler`|error handler/],
    ['a second handler', [handler, handler], /options/],
    ['a number', [handler, 3], /options/],
    ['null', [handler, null], /options/],
    ['an unknown option', [handler, { retries: 3 }], /`retries`.*attempts/],
    ...['3', 0, -1, 1.5, Number.NaN, Number.POSITIVE_INFINITY, null].map((attempts): [string, unknown[], RegExp] => [
      `attempts: ${attempts}`,
      [handler, { attempts }],
      /`attempts`/,
    ]),
  ];
  it.each(mistakes)('throws a TypeError that says so: %s', (_name, args, message) => {
    const call = () => (retryable as (...args: unknown[]) => unknown)(...args);
    expect(call).toThrow(TypeError);
    expect(call).toThrow(message);
  });

  it('names the way out where there is no session yet', async () => {
    const errors: { code?: string }[] = [];
    const inner = Router().use(sessionMiddleware(ledger.knex), (_req, res) => void res.end());
    const { url } = await ledger.listen(express().use(retryable(inner), answerErrors(errors)));
    expect(await get(url)).toMatchObject({ status: 500 });
    expect(errors).toEqual([expect.objectContaining({ code: 'ERR_SESSION_MISSING' })]);
  });
});

describe('where retryable() stands', () => {
  const twice = async (req: Request, res: Response): Promise<void> => {
    const attempt = 1 + Number(req.app.locals['attempt'] ?? 0);
    req.app.locals['attempt'] = attempt;
    await store(req, attempt);
    if (attempt === 1) throw transient();
    res.json({ attempt, url: req.originalUrl, base: req.baseUrl, id: req.params['id'] });
  };
  const places: Record<string, (handler: RequestHandler) => RequestHandler> = {
    'in a router': (handler) => Router().get('/:id', retryable(handler)),
    'in a router with its own error handlers': (handler) =>
      Router().use(Router().get('/:id', retryable(handler)), sessionErrorHandler(), answerErrors([])),
    'around a router': (handler) => retryable(Router().get('/:id', handler)),
    'in another retryable()': (handler) => retryable(Router().get('/:id', retryable(retryable(handler)))),
    'around sessionOptions()': (handler) => retryable(Router().get('/:id', sessionOptions({ isolationLevel: 'serializable' }), handler)),
  };
  it.each(Object.entries(places))('runs the handler again, with one effect: %s', async (_name, place) => {
    const site = await openSite(ledger, { routes: (app) => app.use('/notes', place(twice)) });
    const answer = await get(`${site.url}/notes/7`);
    expect(answer).toMatchObject({ status: 200, complete: true });
    expect(JSON.parse(answer.body)).toEqual({ attempt: 2, url: '/notes/7', base: '/notes', id: '7' });
    expect(await ledger.stored()).toEqual(['stored by 2']);
    expect(site.sessions.stats()).toMatchObject({ committed: 1, rolledBack: 1, open: 0 });
  });
});

describe('when something was asked of the session before the handler', () => {
  const modes = "SELECT current_setting('transaction_isolation') AS level, current_setting('app.tenant', true) AS tenant";
  it('holds for each attempt: options, and settings', async () => {
    const seen: unknown[] = [];
    const site = await serve(
      async (req, res, _next, attempt) => {
        // Its own, on top of them, are its own.
        if (attempt === 1) sessionOptions({ readOnly: true })(req, res, () => {});
        if (attempt === 2) await req.session.set({ 'app.tenant': 'another' });
        seen.push(...(await req.session.raw(modes)).rows);
        if (attempt < 3) throw transient();
        res.json(await store(req, attempt));
      },
      {
        before: [
          sessionOptions({ isolationLevel: 'repeatable read' }),
          (req, _res, next) => void req.session.set({ 'app.tenant': 'first' }).then(() => next(), next),
        ],
      },
    );
    expect(await site.get()).toMatchObject({ status: 200 });
    const level = 'repeatable read';
    expect(seen).toEqual(['first', 'another', 'first'].map((tenant) => ({ level, tenant })));
    expect(await ledger.stored()).toEqual(['stored by 3']);
  });

  it('stores nothing after setRollbackOnly(), in no attempt', async () => {
    const onlyLook: RequestHandler = (req, _res, next) => {
      req.session.setRollbackOnly('dry run');
      next();
    };
    const site = await serve(
      async (req, res, _next, attempt) => {
        await store(req, attempt);
        if (attempt === 1) throw transient();
        res.json({ attempt });
      },
      { before: [onlyLook] },
    );
    await site.get();
    expect(await ledger.stored()).toEqual([]);
  });
});

it('finds its session in every attempt, also after an answer from where the context was lost', async () => {
  const answers = new Set<() => void>();
  const site = await serve(
    async (_req, res, _next, attempt) => {
      await currentSession()('notes').insert({ id: `stored by ${attempt}`, at_commit: attempt === 1 ? 'conflict' : null });
      answers.add(() => res.json({ attempt }));
    },
    { context: true },
  );
  const answer = site.get();
  for (let attempt = 1; attempt <= 2; attempt++) {
    await eventually(() => expect(answers.size).toBe(attempt));
    [...answers].at(-1)?.();
  }
  expect(await answer).toMatchObject({ status: 200, body: '{"attempt":2}' });
});

it('runs it as often as it is told to, and leaves no listeners behind', async () => {
  const listeners: number[] = [];
  const site = await serve(
    async (req, res, _next, attempt) => {
      await insert(req, `${attempt}`, attempt < 12 ? 'conflict' : undefined);
      listeners.push(res.listenerCount('close'));
      res.end();
    },
    { attempts: 12 },
  );
  expect(await site.get()).toMatchObject({ status: 200 });
  expect(await ledger.stored()).toEqual(['12']);
  expect(listeners).toEqual(listeners.map(() => listeners[0]));
});
