import { createRequire } from 'node:module';
import express, { type ErrorRequestHandler, type RequestHandler } from 'express';
import { sessionMiddleware, withSession } from 'express-knex-session';
import { type AppOptions, type Handler, REFUSED, useGatedApps } from './support/gated-app';
import { Http2Connection } from './support/http2';
import { failOnWarnings } from './support/warnings';

/* Express does not support HTTP/2. Two ways lead there all the same: http2-express, and a router without an app. */
failOnWarnings();

const http2Express = createRequire(__filename)('http2-express') as (module: typeof express) => express.Express;

const apps = useGatedApps({
  version: 'Express 5 over HTTP/2',
  express: Object.assign(() => http2Express(express), express),
  route: (handler) => handler,
});

const connections: Http2Connection[] = [];
afterEach(async () => {
  for (const connection of connections.splice(0)) await connection.close();
});
async function open(listener: unknown): Promise<Http2Connection> {
  const connection = await Http2Connection.open(listener as never);
  connections.push(connection);
  return connection;
}

const sayWhy: ErrorRequestHandler = (error, _req, res, _next) => {
  res.statusCode = 500;
  res.end(`${error.name}: ${error.message}`);
};
const insert: Handler = async (req, res) => {
  await req.session('entries').insert({ name: 'entry' });
  res.statusCode = 201;
  res.end('ok');
};

function routerWith(...handlers: RequestHandler[]) {
  const router = express.Router();
  router.use(...handlers);
  router.use(sayWhy);
  return (req: unknown, res: unknown) => router(req as never, res as never, () => {});
}

const listeners: Record<string, (handler: Handler, options?: AppOptions) => unknown> = {
  'http2-express': (handler, options) => apps.app(handler, { ...options, errorHandlers: [sayWhy] }),
  'a router alone': (handler) => routerWith(sessionMiddleware(apps.knex), handler as RequestHandler),
};

describe.each(Object.keys(listeners))('when a request comes by HTTP/2, to %s', (name) => {
  it('is refused by name, before anything is run', async () => {
    const statements: string[] = [];
    const listener = ({ sql }: { sql: string }) => statements.push(sql);
    apps.knex.on('query', listener);
    const connection = await open(listeners[name]?.(insert));
    const { status, body, complete } = await connection.get('/');
    apps.knex.removeListener('query', listener);
    expect({ status, complete }).toEqual({ status: 500, complete: true });
    expect(body).toMatch(/^TypeError: .*HTTP\/2.*proxy.*withSession/);
    expect(statements).toEqual([]);
  });
});

describe('when a route that is asked by HTTP/2 uses withSession()', () => {
  const work: Handler = async (req, res) => {
    await withSession(apps.knex, (session) => session('entries').insert({ name: req.url.slice(1) }));
    res.statusCode = 201;
    res.end('ok');
  };
  it('answers after COMMIT, and with the error if COMMIT fails', async () => {
    const connection = await open(routerWith(work as RequestHandler));
    expect(await connection.get('/entry')).toMatchObject({ status: 201, body: 'ok', complete: true });
    expect(await connection.get(`/${REFUSED}`)).toMatchObject({ status: 500, complete: true });
    expect(await apps.names()).toEqual(['entry']);
  });
});
