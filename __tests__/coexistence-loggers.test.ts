import { once } from 'node:events';
import type { Express, RequestHandler } from 'express';
import { getSession, type SessionOptions } from 'express-knex-session';
import { type AppOptions, deferred, type Handler, REFUSED, useGatedApps } from './support/gated-app';
import { get, RawClient } from './support/http';
import { type Log, morganTo, pinoTo } from './support/middleware';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

const apps = useGatedApps();

const loggers: Record<string, (log: Log) => RequestHandler> = { morgan: morganTo, 'pino-http': pinoTo };

const firstStatement: RequestHandler = async (req, _res, next) => {
  await req.session.raw('SELECT 1');
  next();
};

const positions: Record<string, (logger: RequestHandler) => AppOptions> = {
  'before the session': (logger) => ({ before: (app: Express) => app.use(logger) }),
  'after the session': (logger) => ({ after: (app: Express) => app.use(logger) }),
  'after the first statement': (logger) => ({ after: (app: Express) => app.use(firstStatement, logger) }),
};

const insert = async (req: Parameters<Handler>[0], name: string): Promise<void> => {
  await getSession(req)('entries').insert({ name });
};

interface Situation {
  handler: Handler;
  status: number;
  options?: SessionOptions;
}

const situations: Record<string, Situation> = {
  'a success': {
    handler: async (req, res) => {
      await insert(req, 'entry');
      res.status(201).json({ ok: true });
    },
    status: 201,
  },
  'a success in parts': {
    handler: async (req, res) => {
      await insert(req, 'entry');
      res.status(202).write('a');
      res.end('b');
    },
    status: 202,
  },
  'a response of 409': {
    handler: async (req, res) => {
      await insert(req, 'entry');
      res.status(409).end();
    },
    status: 409,
  },
  'a handler that throws': {
    handler: async (req) => {
      await insert(req, 'entry');
      throw Object.assign(new Error('no'), { status: 422 });
    },
    status: 422,
  },
  'a COMMIT that fails': {
    handler: async (req, res) => {
      await insert(req, REFUSED);
      res.status(201).json({ ok: true });
    },
    status: 500,
  },
  'a COMMIT that fails, after writeHead': {
    handler: async (req, res) => {
      await insert(req, REFUSED);
      res.writeHead(201).end('ok');
    },
    status: 500,
  },
  'a COMMIT that fails, in parts': {
    handler: async (req, res) => {
      await insert(req, REFUSED);
      res.status(201).write('a');
      res.end('b');
    },
    status: 500,
  },
  "a COMMIT that fails, with commitAt: 'end' and nothing sent": {
    handler: async (req, res) => {
      await insert(req, REFUSED);
      res.status(201).end('ok');
    },
    status: 500,
    options: { commitAt: 'end' },
  },
  'a handler that hangs': {
    handler: async (req) => {
      await insert(req, 'entry');
      await once(req.session.signal, 'abort');
    },
    status: 503,
    options: { transactionTimeout: 100 },
  },
};

const cases = Object.keys(loggers).flatMap((logger) =>
  Object.keys(positions).flatMap((position) => Object.keys(situations).map((situation) => [logger, position, situation] as const)),
);

/** An app with a logger, and what that has logged. */
async function serve(logger: string, position: string, handler: Handler, options: SessionOptions = {}) {
  const logged: (number | undefined)[] = [];
  const make = loggers[logger] as (log: Log) => RequestHandler;
  const server = await apps.gated(handler, {
    ...options,
    ...positions[position]?.(make((status) => logged.push(status))),
    errorHandlers: [(error, _req, res, _next) => res.status(error.status ?? 500).end()],
  });
  return { ...server, logged };
}

describe.each(cases)('when %s is mounted %s, and there is %s', (logger, position, name) => {
  const { handler, status, options } = situations[name] as Situation;

  it('logs once, the status that the client has got (72)', async () => {
    const { url, logged } = await serve(logger, position, handler, options);
    expect(await get(url)).toMatchObject({ status, complete: true });
    await eventually(() => expect(logged).toEqual([status]));
  });
});

describe.each(Object.keys(loggers))('when %s logs a response that is cut', (logger) => {
  // As in a plain app whose stream breaks off: the head has left, and the client has got its status.
  it("logs the status that had left, once (commitAt: 'end')", async () => {
    const { url, logged } = await serve(
      logger,
      'before the session',
      async (req, res) => {
        await insert(req, REFUSED);
        res.status(202).write('a');
        await new Promise((resolve) => setImmediate(resolve));
        res.end('b');
      },
      { commitAt: 'end' },
    );
    expect(await get(url)).toMatchObject({ status: 202, complete: false });
    await eventually(() => expect(logged).toHaveLength(1));
    expect(logged).toEqual([202]);
  });
});

describe.each(Object.keys(loggers))('when %s logs a request whose client has left', (logger) => {
  it('logs it once, as in a plain app', async () => {
    const seen: Record<string, unknown> = {};
    for (const kind of ['plain', 'gated'] as const) {
      const logged: unknown[] = [];
      const inserted = deferred();
      const closed = deferred();
      const make = loggers[logger] as (log: Log) => RequestHandler;
      const { port } = await apps[kind](
        async (req, res) => {
          res.once('close', () => closed.resolve());
          await req.session('entries').insert({ name: 'entry' });
          inserted.resolve();
          await closed.promise;
          res.json({ ok: true });
        },
        positions['before the session']?.(make((status) => logged.push(status))),
      );
      const client = await RawClient.connect(port);
      client.get('/');
      await inserted.promise;
      await client.reset();
      await eventually(() => expect(logged).toHaveLength(1));
      await eventually(() => expect(poolUsage(apps.knex).used).toBe(0));
      seen[kind] = logged;
    }
    expect(seen['gated']).toEqual(seen['plain']);
  });
});
