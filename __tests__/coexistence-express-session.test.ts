import type { Express, Request, RequestHandler } from 'express';
import { expressSession } from './support/express-session';
import { type AppOptions, type Handler, REFUSED, useGatedApps } from './support/gated-app';
import { type Answer, get, keepAliveAgent } from './support/http';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

const apps = useGatedApps();

type Visited = Request & { db: Request['session']; session: { visits?: number; save(callback: (error?: unknown) => void): void } };

const firstStatement: RequestHandler = async (req, _res, next) => {
  await (req as Visited).db('entries').insert({ name: 'first' });
  next();
};

const positions: Record<string, (login: RequestHandler) => AppOptions> = {
  'before the session': (login) => ({ before: (app: Express) => app.use(login) }),
  'after the session': (login) => ({ after: (app: Express) => app.use(login) }),
  'after the first statement': (login) => ({ after: (app: Express) => app.use(firstStatement, login) }),
};

/** Ours is on `req.db`. */
function serve(
  position: string,
  handler: (req: Visited, ...rest: Parameters<Handler> extends [unknown, ...infer Rest] ? Rest : never) => unknown,
  options: AppOptions = {},
) {
  const login = expressSession({ secret: 'secret', resave: false, saveUninitialized: false });
  return apps.gated((req, res, next) => handler(req as Visited, res, next), {
    property: 'db',
    ...positions[position]?.(login),
    ...options,
  });
}

const cookieOf = (answer: Answer): string => String(answer.headers['set-cookie']).split(';')[0] ?? '';

describe.each(Object.keys(positions))('when express-session is mounted %s', (position) => {
  it('saves the login session and the entry, and sends nothing before COMMIT (72, hazard 24)', async () => {
    const { url, sockets } = await serve(position, async (req, res) => {
      await req.db('entries').insert({ name: 'entry' });
      req.session.visits = (req.session.visits ?? 0) + 1;
      res.json({ visits: req.session.visits });
    });
    const hold = apps.hold();
    const first = get(url);
    await hold.reached;
    expect(sockets[0]?.bytesWritten).toBe(0);
    hold.release();
    const answer = await first;
    expect(answer).toMatchObject({ status: 200, body: '{"visits":1}', complete: true });
    expect(await get(url, { headers: { cookie: cookieOf(answer) } })).toMatchObject({ body: '{"visits":2}', complete: true });
    expect(poolUsage(apps.knex).used).toBe(0);
    expect((await apps.names()).filter((name) => name === 'entry')).toHaveLength(2);
  });

  it('saves the login session on responses without a body, and on those in parts (72)', async () => {
    const { url } = await serve(position, async (req, res) => {
      await req.db('entries').insert({ name: 'entry' });
      req.session.visits = (req.session.visits ?? 0) + 1;
      if (req.path === '/redirect') return res.redirect('/elsewhere');
      if (req.path === '/nothing') return res.sendStatus(204);
      res.write(`${req.session.visits} `);
      return res.end('visits');
    });
    const agent = keepAliveAgent();
    const headers = { cookie: cookieOf(await get(`${url}/redirect`, { agent })) };
    expect(headers.cookie).toMatch(/^connect\.sid=/);
    expect(await get(`${url}/nothing`, { agent, headers })).toMatchObject({ status: 204, complete: true });
    expect(await get(`${url}/redirect`, { agent, headers })).toMatchObject({ status: 302, complete: true });
    expect(await get(url, { agent, headers })).toMatchObject({ status: 200, body: '4 visits', complete: true });
    agent.destroy();
  });

  it('sends the error, and serves the next request, if COMMIT fails (19, 38)', async () => {
    const { url } = await serve(
      position,
      async (req, res) => {
        await req.db('entries').insert({ name: req.path === '/refused' ? REFUSED : 'entry' });
        req.session.visits = (req.session.visits ?? 0) + 1;
        res.cookie('mine', '1').json({ visits: req.session.visits });
      },
      { errorHandlers: [(_error, _req, res, _next) => res.json({ error: 'refused' })] },
    );
    const agent = keepAliveAgent();
    const refused = await get(`${url}/refused`, { agent });
    expect(refused).toMatchObject({ status: 500, body: '{"error":"refused"}', complete: true });
    expect(String(refused.headers['set-cookie'])).not.toContain('mine=');
    expect(await get(url, { agent })).toMatchObject({ status: 200, body: '{"visits":1}', complete: true });
    expect((await apps.names()).filter((name) => name !== 'first')).toEqual(['entry']);
    agent.destroy();
  });

  it('lets the handler save the login session by itself before it answers', async () => {
    const { url } = await serve(position, async (req, res, next) => {
      await req.db('entries').insert({ name: 'entry' });
      req.session.visits = 7;
      req.session.save((error) => (error ? next(error) : res.redirect('/elsewhere')));
    });
    const answer = await get(url);
    expect(answer).toMatchObject({ status: 302, complete: true });
    expect(cookieOf(answer)).toMatch(/^connect\.sid=/);
    expect(await apps.names()).toContain('entry');
  });
});

describe('when req.session is claimed by both', () => {
  const login = () => expressSession({ secret: 'secret', resave: false, saveUninitialized: false });

  it('is an error that says how to have both, if express-session was first (73, hazard 29)', async () => {
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
    expect(String(seen[0])).toMatch(/req\.session is already set \(express-session\?\).*property: 'db'/);
  });

  it('is ours if we were first; express-session switches itself off, and its habits are named (hazard 29, 76)', async () => {
    const { url } = await apps.gated(
      async (req, res) => {
        await req.session('entries').insert({ name: 'entry' });
        const named = ['save', 'regenerate', 'reload', 'touch'].map((method) => {
          try {
            (req.session as unknown as Record<string, () => void>)[method]?.();
            return 'nothing';
          } catch (error) {
            return (error as { code?: string }).code;
          }
        });
        res.json(named);
      },
      { after: (app) => app.use(login()) },
    );
    expect((await get(url)).body).toBe(JSON.stringify(Array(4).fill('ERR_NOT_A_LOGIN_SESSION')));
    expect(await apps.names()).toEqual(['entry']);
  });
});
