import { once } from 'node:events';
import { createRequire } from 'node:module';
import express, { type ErrorRequestHandler, type Express, type RequestHandler, type Response } from 'express';
import { retryable, type SessionOptions } from 'express-knex-session';
import { type AppOptions, type Handler, REFUSED, useGatedApps } from './support/gated-app';
import { middlewares } from './support/middleware';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

/* An adapter for AWS Lambda: the app's request and response have no socket, and what stands for one emits nothing. */
failOnWarnings();

interface Result {
  statusCode: number;
  headers: Record<string, string>;
  cookies: string[];
  body: string;
}
const serverless = createRequire(__filename)('serverless-http') as (app: Express) => (event: object, context: object) => Promise<Result>;

const apps = useGatedApps();

/** An event of API Gateway. */
function call(app: Express, name: string, body?: string): Promise<Result> {
  const http = { method: body === undefined ? 'GET' : 'POST', path: `/${name}`, sourceIp: '127.0.0.1' };
  return serverless(app)(
    { version: '2.0', rawPath: http.path, headers: { 'content-type': 'text/plain' }, body: body ?? '', requestContext: { http } },
    {},
  );
}

const answerCode: ErrorRequestHandler = (error, _req, res, _next) => res.status(error.status ?? 500).json({ error: error.code });
const gated = (handler: Handler, options: AppOptions = {}) => apps.app(handler, { errorHandlers: [answerCode], ...options });

const insert =
  (answer: (res: Response) => unknown): Handler =>
  async (req, res) => {
    await req.session('entries').insert({ name: req.path.slice(1) });
    return answer(res);
  };

const answers: Record<string, (res: Response) => unknown> = {
  json: (res) => res.status(201).cookie('mine', '1').json({ ok: true }),
  'write and end': (res) => {
    res.status(201).write('a');
    res.end('b');
  },
  'writeHead and end': (res) => res.writeHead(201, { 'X-Mine': '1' }).end('ab'),
  flushHeaders: (res) => {
    res.status(201).flushHeaders();
    res.end('ab');
  },
  sendFile: (res) => res.status(201).sendFile(__filename),
};
const modes = ['head', 'end'] as const;
const cases = Object.keys(answers).flatMap((answer) => modes.map((commitAt) => [answer, commitAt] as const));

describe.each(cases)("when the app runs on serverless-http, and the response is %s, with commitAt: '%s'", (name, commitAt) => {
  const answer = answers[name] as (res: Response) => unknown;

  it('resolves after COMMIT, with what the adapter gives for a plain app (78)', async () => {
    const hold = apps.hold();
    let isResolved = false;
    const result = call(gated(insert(answer), { commitAt }), 'entry').finally(() => {
      isResolved = true;
    });
    await hold.reached;
    await new Promise((resolve) => setImmediate(resolve));
    expect(isResolved).toBe(false);
    hold.release();
    const plain = express().use((_req, res) => void answer(res));
    expect(await result).toEqual(await call(plain, 'entry'));
    expect(poolUsage(apps.knex).used).toBe(0);
    expect(await apps.names()).toEqual(['entry']);
  });
});

describe('when the app runs on serverless-http', () => {
  it.each(Object.keys(answers))('resolves with the error, and nothing of the success, if COMMIT fails: %s (78)', async (name) => {
    const result = await call(gated(insert(answers[name] as (res: Response) => unknown)), REFUSED);
    expect(result).toMatchObject({ statusCode: 500, body: '{"error":"23514"}', cookies: [] });
    expect(result.headers).not.toHaveProperty('x-mine');
    expect(poolUsage(apps.knex).used).toBe(0);
  });

  it('rolls back if the handler throws, and if the response is an error', async () => {
    const failing = gated(async (req, res) => {
      await req.session('entries').insert({ name: 'entry' });
      if (req.path === '/throws') throw new Error('no');
      res.sendStatus(409);
    });
    expect(await call(failing, 'throws')).toMatchObject({ statusCode: 500 });
    expect(await call(failing, 'conflict')).toMatchObject({ statusCode: 409 });
    expect(await apps.names()).toEqual([]);
  });

  it('reads a body, and runs no SQL if the session is not used', async () => {
    const statements: string[] = [];
    const listener = ({ sql }: { sql: string }) => statements.push(sql);
    apps.knex.on('query', listener);
    const app = gated((req, res) => res.send(req.body), { before: (app) => app.use(express.text()) });
    expect(await call(app, '', 'a body')).toMatchObject({ statusCode: 200, body: 'a body' });
    apps.knex.removeListener('query', listener);
    expect(statements).toEqual([]);
  });

  it('answers for a handler that hangs', async () => {
    const app = gated(
      async (req) => {
        await req.session('entries').insert({ name: 'entry' });
        await once(req.session.signal, 'abort');
      },
      { transactionTimeout: 100 },
    );
    expect(await call(app, '')).toMatchObject({ statusCode: 503, body: '{"error":"ERR_SESSION_TIMEOUT"}' });
    expect(await apps.names()).toEqual([]);
  });

  it('has room for the middleware of an app', async () => {
    const all: RequestHandler[] = ['express-session', 'cors', 'helmet', 'morgan', 'compression'].map(
      (name) => middlewares[name]?.() as RequestHandler,
    );
    const options = { property: 'db', before: (app: Express) => app.use(...all) } satisfies AppOptions;
    const app = gated(async (req, res) => {
      await (req as typeof req & { db: typeof req.session }).db('entries').insert({ name: req.path.slice(1) });
      res.json({ ok: true });
    }, options);
    expect(await call(app, 'entry')).toMatchObject({ statusCode: 200, body: '{"ok":true}' });
    expect(await call(app, REFUSED)).toMatchObject({ statusCode: 500, body: '{"error":"23514"}' });
    expect(await apps.names()).toEqual(['entry']);
  });

  it('runs a retryable handler again', async () => {
    let attempts = 0;
    const handler = retryable(async (req, res) => {
      attempts++;
      await req.session('entries').insert({ name: `attempt ${attempts}` });
      if (attempts === 1) throw Object.assign(new Error('could not serialize access'), { code: '40001' });
      res.json({ attempts });
    });
    expect(await call(gated(handler as Handler), '')).toMatchObject({ statusCode: 200, body: '{"attempts":2}' });
    expect(await apps.names()).toEqual(['attempt 2']);
  });

  it("tells of a COMMIT that fails after bytes were written (commitAt: 'end')", async () => {
    const options: SessionOptions = { commitAt: 'end' };
    const app = gated(
      insert(async (res) => {
        res.status(201).write('a');
        await new Promise((resolve) => setImmediate(resolve));
        res.end('b');
      }),
      options,
    );
    const result = await call(app, REFUSED).catch((error) => error);
    expect(result).not.toMatchObject({ statusCode: 201 });
    expect(apps.reported).toEqual([expect.objectContaining({ code: '23514' })]);
  });
});
