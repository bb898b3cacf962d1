import express, { type ErrorRequestHandler, type RequestHandler } from 'express';
import { withSession } from 'express-knex-session';
import { type Handler, REFUSED, useGatedApps } from './support/gated-app';
import { Http2Connection } from './support/http2';
import { failOnWarnings } from './support/warnings';

/* Express does not support HTTP/2; a router without an app does. */
failOnWarnings();

const apps = useGatedApps();
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
function routerWith(...handlers: RequestHandler[]) {
  const router = express.Router();
  router.use(...handlers);
  router.use(sayWhy);
  return (req: unknown, res: unknown) => router(req as never, res as never, () => {});
}

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
