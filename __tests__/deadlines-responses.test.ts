import { AsyncLocalStorage } from 'node:async_hooks';
import compression from 'compression';
import express, { type ErrorRequestHandler, type RequestHandler } from 'express';
import { sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import { never, openSite } from './support/deadlines';
import { get, RawClient } from './support/http';
import { answerErrors, insert, useLedger } from './support/ledger';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();
const LIMIT = 100;
const gzip = { headers: { 'Accept-Encoding': 'gzip' }, signal: AbortSignal.timeout(15_000) };

/** An app with other middleware before and after the session, whose handler writes something and hangs. */
async function siteWith(
  before: RequestHandler[],
  after: RequestHandler[],
  text: string,
  commitAt: 'head' | 'end' = 'head',
): Promise<string> {
  const app = express();
  for (const each of before) app.use(each);
  app.use(sessionMiddleware(ledger.knex, { transactionTimeout: LIMIT, commitAt, onError: () => {} }));
  for (const each of after) app.use(each);
  app.use(async (req, res) => {
    res.type('text');
    await insert(req, 'a').catch(() => {});
    res.write(text);
    await never();
  });
  app.use(sessionErrorHandler(), answerErrors([]));
  return (await ledger.listen(app)).url;
}

describe('when a handler that hangs has written through compression', () => {
  it.each([
    ['before the session, a little', [compression({ threshold: 0 })], [], 'x'],
    ['before the session, much', [compression({ threshold: 0 })], [], 'x'.repeat(100_000)],
    ['after the session, a little', [], [compression({ threshold: 0 })], 'x'],
    ['after the session, much', [], [compression({ threshold: 0 })], 'x'.repeat(100_000)],
    ['after the session, more than it keeps', [], [compression({ threshold: 0 })], noise()],
  ])("sends a whole error, or cuts the connection, with commitAt: 'end': %s", async (_where, before, after, text) => {
    const answer = await get(await siteWith(before, after, text, 'end'), gzip);
    await ledger.isClean();
    expect(await ledger.stored()).toEqual([]);
    // The head of the success may be on its way, but never its end.
    if (answer.status === 200) expect(answer.complete).toBe(false);
    else if (answer.status !== 0) expect(answer).toMatchObject({ status: 503, complete: true });
    if (answer.status === 503 && answer.headers['content-encoding'] === undefined) expect(answer.body).toContain('ERR_SESSION_TIMEOUT');
  });
});

describe('when a response has no body, or another form', () => {
  it.each(['HEAD', 'POST', 'OPTIONS'])('answers %s with the status of the error', async (method) => {
    const site = await openSite(ledger, (req) => insert(req, 'a').then(never), { transactionTimeout: LIMIT });
    const answer = await fetch(site.url, { method, signal: AbortSignal.timeout(4_000) });
    expect(answer.status).toBe(503);
    expect(await answer.text()).toMatch(method === 'HEAD' ? /^$/ : /ERR_SESSION_TIMEOUT/);
  });

  it('answers a client of HTTP/1.0', async () => {
    const site = await openSite(ledger, (req) => insert(req, 'a').then(never), { transactionTimeout: LIMIT });
    const client = await RawClient.connect(site.port);
    client.write('GET / HTTP/1.0\r\n\r\n');
    await client.closed;
    expect(client.received).toMatch(/^HTTP\/1\.1 503 .*ERR_SESSION_TIMEOUT/s);
  });

  it('never sends a success, though an error handler wants to', async () => {
    const site = await openSite(ledger, (req) => insert(req, 'a').then(never), {
      transactionTimeout: LIMIT,
      errorHandlers: () => [sessionErrorHandler(), (_error, _req, res, _next) => void res.status(200).json({ ok: false })],
    });
    expect(await site.get()).toMatchObject({ status: 503, complete: true });
  });

  it('gives the connection back though an error handler hangs, too', async () => {
    const site = await openSite(ledger, (req) => insert(req, 'a').then(never), {
      transactionTimeout: LIMIT,
      errorHandlers: (errors) => [sessionErrorHandler(), (error, _req, _res, _next) => void errors.push(error)],
    });
    const client = (await RawClient.connect(site.port)).get('/');
    await eventually(() => expect(site.errors).toMatchObject([{ code: 'ERR_SESSION_TIMEOUT' }]));
    await ledger.isClean();
    await client.destroy();
  });
});

// As a logger's request id, for one.
describe('when the application keeps a context of its own for each request', () => {
  const contexts = new AsyncLocalStorage<string>();

  it('runs listeners and error handlers in it when the time has passed', async () => {
    const seen: unknown[] = [];
    const app = express();
    app.use((req, _res, next) => contexts.run(req.path, next));
    app.use(sessionMiddleware(ledger.knex, { transactionTimeout: LIMIT }), async (req) => {
      req.session.signal.addEventListener('abort', () => seen.push(contexts.getStore()));
      await insert(req, req.path);
      await never();
    });
    const errorHandler: ErrorRequestHandler = (error, _req, res, _next) => {
      seen.push(contexts.getStore());
      res.sendStatus(error.status);
    };
    app.use(sessionErrorHandler(), errorHandler);
    const { url } = await ledger.listen(app);
    expect((await get(`${url}/mine`)).status).toBe(503);
    expect(seen).toEqual(['/mine', '/mine']);
  });
});

describe('when requests are pipelined', () => {
  it('rolls back the one that times out and leaves nothing of those behind it, which share its end', async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, req.path);
        if (req.path === '/hung' || req.path === '/waits') await never();
        res.status(201).send(req.path);
      },
      { transactionTimeout: (req) => (req.path === '/hung' ? LIMIT : 60_000) },
    );
    const client = await RawClient.connect(site.port);
    client.get('/good').get('/hung').get('/behind').get('/waits');
    await client.closed;
    expect(client.received.match(/HTTP\/1\.1 \d+/g)).toEqual(['HTTP/1.1 201', 'HTTP/1.1 503']);
    await ledger.isClean();
    await eventually(() => expect(site.sessions.stats().open).toBe(0));
    // What is behind it has been stored, or not: its client was never told.
    expect((await ledger.stored()).filter((id) => id !== '/behind')).toEqual(['/good']);
  });
});

/** What compression cannot make small. */
function noise(): string {
  return Array.from({ length: 20_000 }, () => Math.random().toString(36)).join('');
}
