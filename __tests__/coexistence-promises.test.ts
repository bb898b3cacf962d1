import express, { type ErrorRequestHandler, type Express, type RequestHandler, type Response } from 'express';
import { getSession } from 'express-knex-session';
import { getDecoded } from './support/decoded-request';
import { type AppOptions, deferred, type Handler, REFUSED, useGatedApps } from './support/gated-app';
import { keepAliveAgent, type Listening, listen, RawClient } from './support/http';
import { middlewares } from './support/middleware';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

/* Each middleware that apps have, each place where it may stand, each promise of ours. What is special about one has a file of its own. */
failOnWarnings();

const apps = useGatedApps();
const plainApps: Listening[] = [];
afterEach(async () => {
  for (const app of plainApps.splice(0)) await app.close();
});

// On `req.db`: two of them want `req.session`.
const firstStatement: RequestHandler = async (req, _res, next) => {
  await getSession(req, 'db').raw('SELECT 1');
  next();
};

const positions: Record<string, (middleware: RequestHandler) => AppOptions> = {
  'before the session': (middleware) => ({ before: (app: Express) => app.use(middleware) }),
  'after the session': (middleware) => ({ after: (app: Express) => app.use(middleware) }),
  'after the first statement': (middleware) => ({ after: (app: Express) => app.use(firstStatement, middleware) }),
};

const refused: ErrorRequestHandler = (_error, _req, res, _next) => res.json({ error: 'refused' });

const succeed = (res: Response) =>
  res.status(201).cookie('mine', '1').location('/entries/1').set('Cache-Control', 'public').json({ ok: true });

const insertAndSucceed: Handler = async (req, res) => {
  await getSession(req, 'db')('entries').insert({ name: req.path.slice(1) });
  succeed(res);
};

/** A counter and a time differ from run to run, and say nothing. */
function comparable<T extends { headers: Record<string, unknown> }>(answer: T): T {
  const { ratelimit: _, ...headers } = answer.headers;
  return { ...answer, headers };
}

/** The answer of the same app without us. */
async function plainAnswer(middleware: RequestHandler) {
  const app = express();
  app.use(middleware, (_req, res) => succeed(res));
  const listening = await listen(app);
  plainApps.push(listening);
  return comparable(await getDecoded(`${listening.url}/entry`));
}

const places = Object.keys(middlewares).flatMap((name) => Object.keys(positions).map((position) => [name, position] as const));

describe.each(places)('when %s is mounted %s', (name, position) => {
  const make = middlewares[name] as () => RequestHandler;
  const serve = (handler: Handler) => apps.gated(handler, { property: 'db', errorHandlers: [refused], ...positions[position]?.(make()) });

  it('sends nothing before COMMIT, and then what it sends in a plain app (72)', async () => {
    const { url, sockets } = await serve(insertAndSucceed);
    const hold = apps.hold();
    const answer = getDecoded(`${url}/entry`);
    await hold.reached;
    expect(sockets[0]?.bytesWritten).toBe(0);
    hold.release();
    expect(comparable(await answer)).toEqual(await plainAnswer(make()));
    expect(await apps.names()).toEqual(['entry']);
  });

  it('leaves nothing of the success if COMMIT fails, and serves the next request on the connection (72)', async () => {
    const { url } = await serve(insertAndSucceed);
    const agent = keepAliveAgent();
    const answer = await getDecoded(`${url}/${REFUSED}`, { agent });
    expect(answer).toMatchObject({ status: 500, body: '{"error":"refused"}', complete: true });
    expect(Object.keys(answer.headers)).toEqual(expect.not.arrayContaining(['set-cookie', 'location', 'cache-control']));
    expect(poolUsage(apps.knex).used).toBe(0);
    expect(await getDecoded(`${url}/entry`, { agent })).toMatchObject({ status: 201, body: '{"ok":true}', complete: true });
    expect(await apps.names()).toEqual(['entry']);
    agent.destroy();
  });

  it('rolls back and gives the connection back if the handler throws (72)', async () => {
    const { url } = await serve(async (req) => {
      await getSession(req, 'db')('entries').insert({ name: 'entry' });
      throw Object.assign(new Error('no'), { status: 418 });
    });
    expect(await getDecoded(url)).toMatchObject({ body: '{"error":"refused"}', complete: true });
    expect(poolUsage(apps.knex).used).toBe(0);
    expect(await apps.names()).toEqual([]);
  });

  it('rolls back and gives the connection back if the client disconnects (72)', async () => {
    const closed = deferred<void>();
    const inserted = deferred();
    const { port } = await serve(async (req, res) => {
      res.once('close', closed.resolve);
      await getSession(req, 'db')('entries').insert({ name: 'entry' });
      inserted.resolve();
      await closed.promise;
      succeed(res);
    });
    const client = await RawClient.connect(port);
    client.get('/');
    await inserted.promise;
    await client.reset();
    await eventually(() => expect(poolUsage(apps.knex).used).toBe(0));
    expect(await apps.names()).toEqual([]);
  });

  // The first statement would be a use.
  if (position === 'after the first statement') return;
  it('runs no SQL, takes no connection, and leaves the response alone if the session is not used (72)', async () => {
    const own: string[][] = [];
    const methodsOf = (res: Response) =>
      Object.keys(res).filter((key) => typeof (res as unknown as Record<string, unknown>)[key] === 'function');
    const handler: Handler = (_req, res) => {
      own.push(methodsOf(res));
      succeed(res);
    };
    const statements: string[] = [];
    const listener = ({ sql }: { sql: string }) => statements.push(sql);
    apps.knex.on('query', listener);
    const { url } = await serve(handler);
    expect(comparable(await getDecoded(url))).toEqual(await plainAnswer(make()));
    apps.knex.removeListener('query', listener);
    expect(statements).toEqual([]);
    // Without us, the same methods are the response's own.
    const app = express();
    app.use(make(), handler as RequestHandler);
    const plain = await listen(app);
    plainApps.push(plain);
    await getDecoded(plain.url);
    expect(own[0]).toEqual(own[1]);
  });
});
