import type { Express, Request, RequestHandler } from 'express';
import { getSession } from 'express-knex-session';
import { type AppOptions, type Handler, REFUSED, useGatedApps } from './support/gated-app';
import { type Answer, get } from './support/http';
import { cookieSession } from './support/middleware';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

const apps = useGatedApps();
const login = () => cookieSession({ keys: ['key'] });

type Visited = Request & { db: Request['session']; session: { visits?: number } };
const visited =
  (handler: (req: Visited, res: Parameters<Handler>[1]) => unknown): Handler =>
  (req, res) =>
    handler(req as Visited, res);

const firstStatement: RequestHandler = async (req, _res, next) => {
  await (req as Visited).db('entries').insert({ name: 'first' });
  next();
};

const positions: Record<string, () => AppOptions> = {
  'before the session': () => ({ before: (app: Express) => app.use(login()) }),
  'after the session': () => ({ after: (app: Express) => app.use(login()) }),
  'after the first statement': () => ({ after: (app: Express) => app.use(firstStatement, login()) }),
};

const cookiesOf = (answer: Answer): string => (answer.headers['set-cookie'] ?? []).map((cookie) => cookie.split(';')[0]).join('; ');

describe.each(Object.keys(positions))('when cookie-session is mounted %s, and ours is req.db', (position) => {
  const serve = (handler: Handler) =>
    apps.gated(handler, {
      property: 'db',
      errorHandlers: [(_error, _req, res, _next) => res.status(500).end()],
      ...positions[position]?.(),
    });

  it('keeps both sessions, and sends the cookie after COMMIT (72)', async () => {
    const { url, sockets } = await serve(
      visited(async (req, res) => {
        await req.db('entries').insert({ name: 'entry' });
        req.session.visits = (req.session.visits ?? 0) + 1;
        res.json({ visits: req.session.visits });
      }),
    );
    const hold = apps.hold();
    const first = get(url);
    await hold.reached;
    expect(sockets[0]?.bytesWritten).toBe(0);
    hold.release();
    const cookie = cookiesOf(await first);
    expect(await get(url, { headers: { cookie } })).toMatchObject({ status: 200, body: '{"visits":2}' });
    expect((await apps.names()).filter((name) => name === 'entry')).toHaveLength(2);
  });

  // As with a handler that throws, in an app without us: the cookie is written with whatever head is sent.
  it('sends what the handler has put into the login session with the error too, unless it stood inside of the transaction', async () => {
    const { url } = await serve(
      visited(async (req, res) => {
        await req.db('entries').insert({ name: REFUSED });
        req.session.visits = 7;
        res.json({ visits: 7 });
      }),
    );
    const answer = await get(url);
    expect(answer).toMatchObject({ status: 500, body: '', complete: true });
    if (position === 'after the first statement') expect(cookiesOf(answer)).toBe('');
    else expect(cookiesOf(answer)).toMatch(/^session=/);
  });
});

describe('when req.session is claimed by both', () => {
  const codeOf = (work: () => unknown): unknown => {
    try {
      return work();
    } catch (error) {
      return (error as { code?: string }).code ?? (error as Error).message;
    }
  };

  it('is an error that says how to have both, if cookie-session was first (73, hazard 29)', async () => {
    const seen: unknown[] = [];
    const { url } = await apps.gated((_req, res) => res.end(), {
      before: (app) => app.use(login()),
      errorHandlers: [
        (error, _req, res, _next) => {
          seen.push(error);
          res.status(500).end();
        },
      ],
    });
    expect(await get(url)).toMatchObject({ status: 500 });
    expect(String(seen[0])).toMatch(/req\.session is already set .*property: 'db'/);
  });

  it('is theirs without a word if we were first; getSession() names it (hazard 38)', async () => {
    const { url } = await apps.gated(
      (req, res) => {
        res.json([typeof req.session, codeOf(() => getSession(req)), codeOf(() => req.session('entries'))]);
      },
      { after: (app) => app.use(login()) },
    );
    expect(JSON.parse((await get(url)).body)).toEqual(['object', 'ERR_SESSION_MISSING', 'req.session is not a function']);
    expect(poolUsage(apps.knex).used).toBe(0);
  });

  it.each([
    ['entry', 201, ['entry']],
    [REFUSED, 500, []],
  ])('settles what ours has done before it was replaced: %s (hazard 38)', async (name, status, stored) => {
    const insert: RequestHandler = async (req, _res, next) => {
      await req.session('entries').insert({ name });
      next();
    };
    const { url } = await apps.gated((_req, res) => res.status(201).end(), {
      after: (app) => app.use(insert, login()),
      errorHandlers: [(_error, _req, res, _next) => res.status(500).end()],
    });
    expect(await get(url)).toMatchObject({ status, complete: true });
    expect(poolUsage(apps.knex).used).toBe(0);
    expect(await apps.names()).toEqual(stored);
  });

  it('rolls back what ours has done before it was replaced, if the handler throws (hazard 38)', async () => {
    const insert: RequestHandler = async (req, _res, next) => {
      await req.session('entries').insert({ name: 'entry' });
      next();
    };
    const { url } = await apps.gated(
      () => {
        throw new Error('no');
      },
      { after: (app) => app.use(insert, login()), errorHandlers: [(_error, _req, res, _next) => res.end('all is well')] },
    );
    expect(await get(url)).toMatchObject({ body: 'all is well', complete: true });
    expect(poolUsage(apps.knex).used).toBe(0);
    expect(await apps.names()).toEqual([]);
  });
});
