import { EventEmitter, once } from 'node:events';
import { readFile } from 'node:fs';
import { request as nodeRequest } from 'node:http';
import { Readable, Transform } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import express, { type RequestHandler } from 'express';
import { currentSession, type Session, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { get, listen, post, RawClient } from './support/http';
import { answerError, caught, Ledger } from './support/knex';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const ledger = Ledger.forTests({ pool: { min: 0, max: 3 } });

/** The code of what currentSession() throws, or whether it is this one. */
function isCurrent(session: Session, property?: string): boolean | string {
  try {
    const current = currentSession(property);
    // Inside of a savepoint it is that.
    return current === session || current.parentTransaction === session;
  } catch (error) {
    return (error as { code: string }).code;
  }
}

async function serve(handler: RequestHandler, knex: Knex = ledger.knex, context = true) {
  const app = express().use(sessionMiddleware(knex, { context }));
  return listen(app.use(handler).use(sessionErrorHandler(), answerError));
}

/** What a handler finds out. */
async function inRequest<T>(
  look: (req: express.Request, res: express.Response) => T | Promise<T>,
  knex?: Knex,
  context?: boolean,
): Promise<T> {
  let found: T | undefined;
  const server = await serve(
    async (req, res) => {
      found = await look(req, res);
      if (!res.headersSent) res.end();
    },
    knex,
    context,
  );
  const answer = await get(server.url);
  await server.close();
  expect(answer).toMatchObject({ status: 200, complete: true });
  return found as T;
}

describe('when code that is handed no request asks for the session', () => {
  const ways: [string, (look: () => void, req: express.Request) => unknown][] = [
    ['at once', (look) => look()],
    ['after awaits, many calls deep', (look) => deep(20, look)],
    ['after a statement', (look, { session }) => session.raw('select 1').then(look)],
    [
      'after a statement that was awaited as another request got its connection',
      (look, { session }) => session.transaction((trx) => trx.raw('select 1').then(look)),
    ],
    ['in setTimeout', (look) => new Promise<void>((done) => setTimeout(() => done(look()), 1))],
    ['in setImmediate', (look) => new Promise<void>((done) => setImmediate(() => done(look())))],
    ['in process.nextTick', (look) => new Promise<void>((done) => process.nextTick(() => done(look())))],
    ['in queueMicrotask', (look) => new Promise<void>((done) => queueMicrotask(() => done(look())))],
    ['in a callback of fs', (look) => new Promise<void>((done) => readFile(__filename, () => done(look())))],
    ['in a listener', (look) => void new EventEmitter().once('x', look).emit('x')],
    [
      'in a pipeline of streams',
      (look) => pipeline(Readable.from(['a', 'b']), new Transform({ transform: (_c, _e, done) => done(null, void look()) })),
    ],
    [
      'in for await over rows',
      async (look, { session }) => {
        for await (const _ of session('people').stream()) look();
      },
    ],
    [
      'in a listener of a stream of rows',
      (look, { session }) => once(session('people').stream().on('data', look).on('end', look).resume(), 'close'),
    ],
    [
      'in a pipe from a stream of rows',
      (look, { session }) =>
        pipeline(
          session('people').stream(),
          new Transform({ objectMode: true, transform: (_r, _e, done) => done(null, void look()) }).resume(),
        ),
    ],
    ['in a callback of Knex', (look, { session }) => new Promise<void>((done) => session('people').asCallback(() => done(look())))],
    ['in a listener of queries', (look, { session }) => session('people').on('query', look).on('query-response', look)],
    ['in a savepoint', (look, { session }) => session.transaction(async (trx) => [await trx('people'), look()])],
  ];

  it.each(ways)('gives that of the request: %s', async (_name, way) => {
    const seen = await inRequest(async (req) => {
      const seen: unknown[] = [];
      await way(() => void seen.push(isCurrent(req.session)), req);
      return seen;
    });
    expect(seen.length).toBeGreaterThan(0);
    expect(new Set(seen)).toEqual(new Set([true]));
  });

  it('gives each of 40 interleaved requests its own, whatever connection it runs on', async () => {
    const wrong: string[] = [];
    let looks = 0;
    const server = await serve(async (req, res) => {
      const look = (where: string) => () => void [looks++, isCurrent(req.session) === true || wrong.push(where)];
      for (const [name, way] of ways) await way(look(name), req);
      res.end();
    });
    const answers = await Promise.all(Array.from({ length: 40 }, () => get(server.url)));
    await server.close();
    expect(new Set(answers.map(({ status }) => status))).toEqual(new Set([200]));
    expect(wrong).toEqual([]);
    expect(looks).toBeGreaterThanOrEqual(40 * ways.length);
  });

  it('gives it behind whatever reads the body, and when the response has ended', async () => {
    const { promise, resolve } = deferred<unknown[]>();
    const server = await serve(async (req, res) => {
      const seen: unknown[] = [];
      req.on('data', () => seen.push(isCurrent(req.session)));
      await new Promise<void>((done) => req.on('end', () => [seen.push(isCurrent(req.session)), done()]));
      res.on('finish', () => seen.push(isCurrent(req.session)));
      res.on('close', () => resolve([...seen, isCurrent(req.session)]));
      await req.session.raw('select 1');
      res.end();
    });
    // Its body comes later than its head.
    const outgoing = nodeRequest(server.url, { method: 'POST' });
    outgoing.flushHeaders();
    outgoing.on('response', (response) => response.resume());
    await once(server.server, 'request');
    outgoing.end('x'.repeat(100));
    const seen = await promise;
    await server.close();
    expect(seen.length).toBeGreaterThanOrEqual(4);
    expect(new Set(seen)).toEqual(new Set([true]));
  });

  it('is that of the inner request, where one is served inside of another, and of the outer one afterwards', async () => {
    const inner = await serve((req, res) => res.json(isCurrent(req.session)));
    const seen = await inRequest(async (req) => {
      const before = isCurrent(req.session);
      const answer = await post(inner.url);
      return [before, answer.body, isCurrent(req.session)];
    });
    await inner.close();
    expect(seen).toEqual([true, 'true', true]);
  });

  it('is never that of the request before it on the same socket, pipelined', async () => {
    const seen: unknown[] = [];
    const app = express()
      .get('/none', (req, res) => [seen.push(req.path, isCurrent(req.session)), res.end()])
      .use(sessionMiddleware(ledger.knex, { context: true }))
      .get('/', async (req, res) => {
        await req.session.raw('select 1');
        seen.push(req.path, isCurrent(req.session));
        res.end();
      });
    const server = await listen(app);
    const client = await RawClient.connect(server.port);
    client.get('/');
    await client.readUntil('200 OK');
    client.get('/').get('/none').get('/', 'Connection: close');
    await client.closed;
    await server.close();
    expect([...seen].sort()).toEqual(['/', '/', '/', '/none', 'ERR_SESSION_MISSING', true, true, true]);
  });
});

describe('when there is no such session', () => {
  it('throws outside of requests, and names what to do', () => {
    expect(() => currentSession()).toThrow(
      expect.objectContaining({ code: 'ERR_SESSION_MISSING', message: expect.stringContaining('context: true') }),
    );
  });

  it('throws if the middleware keeps none in context, though another one does', async () => {
    expect(await inRequest((req) => isCurrent(req.session), ledger.knex, false)).toBe('ERR_SESSION_MISSING');
  });

  it('throws for a property that nobody has attached one at', async () => {
    expect(await inRequest((req) => [isCurrent(req.session, 'session'), isCurrent(req.session, 'other')])).toEqual([
      true,
      'ERR_SESSION_MISSING',
    ]);
  });

  it('refuses its statements after the end: it never means another one, or the pool', async () => {
    const { promise, resolve } = deferred<unknown>();
    await inRequest((_req, res) => {
      res.once('close', () => resolve(caught((async () => currentSession()('people').insert({ name: 'late' }))())));
    });
    expect(await promise).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    expect(await ledger.names()).not.toContain('late');
  });
});

describe('when a request has several sessions', () => {
  async function withTwo<T>(properties: [string, string], look: (req: any) => T | Promise<T>): Promise<T> {
    const [one, two] = properties;
    let found: T | undefined;
    const app = express()
      .use(
        sessionMiddleware(ledger.knex, { property: one, context: true }),
        sessionMiddleware(ledger.knex, { property: two, context: true }),
      )
      .get('/', async (req, res) => {
        found = await look(req);
        res.end();
      });
    const server = await listen(app);
    await get(server.url);
    await server.close();
    return found as T;
  }

  it('gives the one that is asked for, else that of `session`, else none', async () => {
    expect(
      await withTwo(['session', 'other'], (req) => [
        isCurrent(req.session),
        isCurrent(req.other, 'other'),
        isCurrent(req.session, 'session'),
      ]),
    ).toEqual([true, true, true]);
    expect(await withTwo(['one', 'two'], (req) => [isCurrent(req.one), isCurrent(req.one, 'one'), isCurrent(req.two, 'two')])).toEqual([
      'ERR_SESSION_MISSING',
      true,
      true,
    ]);
  });

  it('gives that of a unit of work inside of the request, and the others by their properties', async () => {
    const seen = await withTwo(['session', 'other'], async (req) => {
      const inUnit = await withSession(ledger.knex, async (own) => [isCurrent(own), isCurrent(req.other, 'other')]);
      return [...inUnit, isCurrent(req.session)];
    });
    expect(seen).toEqual([true, true, true]);
  });
});

describe('when hooks run', () => {
  it('gives the session that they are given, and that of the request afterwards', async () => {
    const seen: unknown[] = [];
    await inRequest(async (req) => {
      req.session.beforeCommit((session) => seen.push(isCurrent(session), session === req.session));
      req.session.afterCommit(async (session) => [await session.raw('select 1'), seen.push(isCurrent(session), session === req.session)]);
      await req.session.commit();
      seen.push(isCurrent(req.session));
    });
    expect(seen).toEqual([true, true, true, false, true]);
  });
});

async function deep(depth: number, look: () => void): Promise<void> {
  await null;
  if (depth > 0) await deep(depth - 1, look);
  else look();
}
