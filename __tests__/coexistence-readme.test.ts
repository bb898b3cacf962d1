import express, { type Express, type Request, type RequestHandler } from 'express';
import { getSession, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import { deferred, REFUSED, useGatedApps } from './support/gated-app';
import { keepAliveAgent, type Listening, listen, post, RawClient } from './support/http';
import { middlewares, morganTo, pinoTo } from './support/middleware';
import { sectionOf, tableIn } from './support/pages';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

/* An app that is put together as the README's table says: in its order, with all that it names. */
failOnWarnings();

const apps = useGatedApps();
const order = tableIn(sectionOf('With express-session')).map(([cell = '']) => cell.replaceAll('`', '').split(', '));

const logged: unknown[] = [];
let left = deferred();
let inserted = deferred();

/** What is to be mounted under each name of the table; of two that want `req.session`, one is there. */
function parts(login: string): Record<string, (app: Express) => unknown> {
  const use = (name: string) => (app: Express) => app.use(middlewares[name]?.() as RequestHandler);
  const noLogin = login === 'express-session' ? 'cookie-session' : 'express-session';
  return {
    ...Object.fromEntries(Object.keys(middlewares).map((name) => [name, use(name)])),
    morgan: (app) => app.use(morganTo((status) => logged.push(status))),
    'pino-http': (app) => app.use(pinoTo((status) => logged.push(status))),
    [noLogin]: () => {},
    'body parsers': (app) => app.use(express.json()),
    'sessionMiddleware(knex)': (app) => app.use(sessionMiddleware(apps.knex, { property: 'db', onError: () => {} })),
    'authentication that queries': (app) =>
      app.use(async (req, _res, next) => {
        if (req.path !== '/unused') await getSession(req, 'db').raw('SELECT 1');
        next();
      }),
    routes: (app) => {
      app.post('/entries', async (req, res) => {
        await getSession(req, 'db')('entries').insert({ name: req.body.name });
        visitsOf(req);
        res.status(201).cookie('mine', '1').json({ ok: true });
      });
      app.post('/throws', async (req) => {
        await getSession(req, 'db')('entries').insert({ name: 'entry' });
        // An error that is answered with a success: only sessionErrorHandler(), before, makes it a rollback.
        throw Object.assign(new Error('no'), { status: 200 });
      });
      app.post('/unused', (_req, res) => res.end('unused'));
      app.get('/leaves', async (req, res) => {
        res.once('close', () => left.resolve());
        await getSession(req, 'db')('entries').insert({ name: 'entry' });
        inserted.resolve();
        await left.promise;
        res.end();
      });
    },
    'sessionErrorHandler()': (app) => app.use(sessionErrorHandler()),
    'your error handlers': (app) =>
      app.use(((error, _req, res, _next) => {
        res.status(error.status ?? 500).json({ error: error.code ?? error.message });
      }) as express.ErrorRequestHandler),
  };
}

function visitsOf(req: Request): void {
  const login = (req as unknown as { session: { visits?: number } }).session;
  login.visits = (login.visits ?? 0) + 1;
}

let server: Listening | undefined;
afterEach(() => server?.close());

async function serve(login: string): Promise<Listening> {
  logged.length = 0;
  [left, inserted] = [deferred(), deferred()];
  const app = express();
  for (const name of order.flat()) {
    const mount = parts(login)[name];
    if (!mount) throw new Error(`The table names ${name}, which no test knows.`);
    mount(app);
  }
  server = await listen(app);
  return server;
}

describe("the README's order to mount in", () => {
  it('has all that is tested beside the session', () => {
    expect(order.flat()).toEqual(expect.arrayContaining(Object.keys(middlewares)));
  });
});

describe.each(['express-session', 'cookie-session'])("when an app is put together in the README's order, with %s", (login) => {
  it('keeps the promises, and the headers and logs that belong to an error (72)', async () => {
    const { url } = await serve(login);
    const agent = keepAliveAgent();
    const hold = apps.hold();
    let isAnswered = false;
    const stored = post(`${url}/entries`, { name: 'entry' }, { agent }).finally(() => {
      isAnswered = true;
    });
    await hold.reached;
    expect(isAnswered).toBe(false);
    hold.release();
    expect(await stored).toMatchObject({ status: 201, body: '{"ok":true}', complete: true });

    const refused = await post(`${url}/entries`, { name: REFUSED }, { agent });
    expect(refused).toMatchObject({ status: 500, body: '{"error":"23514"}', complete: true });
    expect(Object.keys(refused.headers)).toEqual(
      expect.arrayContaining(['content-security-policy', 'access-control-allow-origin', 'ratelimit']),
    );
    expect(String(refused.headers['set-cookie'])).not.toContain('mine=');

    expect(await post(`${url}/throws`, {}, { agent })).toMatchObject({ status: 200, body: '{"error":"no"}', complete: true });
    await eventually(() => expect(logged).toEqual([201, 201, 500, 500, 200, 200]));
    expect(await apps.names()).toEqual(['entry']);
    expect(poolUsage(apps.knex).used).toBe(0);
    agent.destroy();
  });

  it('runs no SQL for a request that needs none', async () => {
    const { url } = await serve(login);
    const statements: string[] = [];
    const listener = ({ sql }: { sql: string }) => statements.push(sql);
    apps.knex.on('query', listener);
    expect(await post(`${url}/unused`)).toMatchObject({ status: 200, body: 'unused', complete: true });
    expect(await post(`${url}/unused`, '{', { headers: { 'Content-Type': 'application/json' } })).toMatchObject({ status: 400 });
    apps.knex.removeListener('query', listener);
    expect(statements).toEqual([]);
  });

  it('rolls back if the client leaves', async () => {
    const { port } = await serve(login);
    const client = await RawClient.connect(port);
    client.get('/leaves');
    await inserted.promise;
    await client.reset();
    await eventually(() => expect(poolUsage(apps.knex).used).toBe(0));
    expect(await apps.names()).toEqual([]);
  });
});
