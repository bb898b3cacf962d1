import { once } from 'node:events';
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Request, RequestHandler, Response } from 'express';
import { getSession, type Session, SessionError, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import { expressSession as loginSession } from './support/express-session';
import { get, keepAliveAgent } from './support/http';
import { answerErrors, flavours, type Handler, insert, useLedger } from './support/ledger';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

describe.each(flavours)('on $version', (flavour) => {
  const { express, route } = flavour;
  const serve = ledger.serving(flavour);

  // Scenario 32.
  describe('when a session is used outside of its request', () => {
    const refusal = async (use: () => unknown) => {
      try {
        await use();
        return undefined;
      } catch (error) {
        return error;
      }
    };
    const uses: [string, (session: Session) => unknown][] = [
      ['a query', (session) => session('notes').insert({ id: 'late' })],
      ['raw()', (session) => session.raw('SELECT 1')],
      ['a savepoint', (session) => session.transaction((trx) => trx.raw('SELECT 1'))],
      ['setRollbackOnly()', (session) => session.setRollbackOnly()],
    ];
    it.each(uses)('refuses %s by name after the response, whether or not it was used before', async (_, use) => {
      const kept: Session[] = [];
      const finished: Promise<unknown>[] = [];
      const { url } = await serve(async (req, res) => {
        kept.push(getSession(req));
        finished.push(once(res, 'close'));
        if (req.path === '/used') await insert(req, 'a');
        res.sendStatus(200);
      });
      for (const path of ['/used', '/unused']) await get(url + path);
      await Promise.all(finished);

      for (const session of kept) {
        const error = await refusal(() => use(session));
        expect(error).toBeInstanceOf(SessionError);
        // It was not the client's doing.
        expect(error).toMatchObject({
          code: 'ERR_SESSION_CLOSED',
          message: expect.stringMatching(/response has (already )?ended.*withSession/),
        });
      }
      expect(poolUsage(ledger.knex).used).toBe(0);
      expect(await ledger.stored()).toEqual(['a']);
    });

    it('refuses a statement that is issued behind the response, in the same handler', async () => {
      let late: unknown;
      const { url } = await serve(async (req, res) => {
        await insert(req, 'a');
        res.sendStatus(200);
        await nextTurn();
        await nextTurn();
        late = await refusal(() => insert(req, 'late'));
      });
      expect(await get(url)).toMatchObject({ status: 200 });
      expect(late).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
      expect(await ledger.stored()).toEqual(['a']);
    });
  });

  // Scenario 33.
  describe('when the middleware is missing', () => {
    it('is named by getSession()', async () => {
      const errors: any[] = [];
      const app = express();
      app.get('/', (req) => void getSession(req));
      app.get('/db', (req) => void getSession(req, 'db'));
      app.use(sessionErrorHandler(), answerErrors(errors));
      const { url } = await ledger.listen(app);
      expect(await get(url)).toMatchObject({ status: 500, body: expect.stringContaining('ERR_SESSION_MISSING') });
      expect(await get(`${url}/db`)).toMatchObject({ status: 500 });
      expect(errors).toEqual([expect.any(SessionError), expect.any(SessionError)]);
      expect(errors[0].message).toContain('req.session');
      expect(errors[0].message).toContain('app.use(sessionMiddleware(knex))');
      expect(errors[1].message).toContain('req.db');
    });

    it('is there: getSession() gives the very session', async () => {
      const { url } = await serve(
        (req, res) => void res.json([getSession(req) === req.session, getSession(req, 'session') === req.session]),
      );
      expect(await get(url)).toMatchObject({ body: '[true,true]' });
    });
  });

  // Scenario 34.
  describe('when the middleware is mounted twice', () => {
    const tell = route(async (req, res) => {
      await insert(req, 'a');
      res.status(201).json((req as { outer?: unknown }).outer === req.session);
    });
    const keepOuter: Handler = (req, _res, next) => {
      Object.assign(req, { outer: req.session });
      next();
    };
    const places: [string, (inner: RequestHandler) => RequestHandler][] = [
      ['in the same app', (inner) => inner],
      ['in a sub-app', (inner) => express().use(inner)],
      ['in a sub-router', (inner) => express.Router().use('/', inner)],
    ];
    it.each(places)('%s: the outer one owns the session', async (_, place) => {
      const app = express();
      app.use(sessionMiddleware(ledger.knex), keepOuter);
      app.use(place(express.Router().use(sessionMiddleware(ledger.knex)).get('/', tell)));
      const { url } = await ledger.listen(app);
      expect(await get(url)).toMatchObject({ status: 201, body: 'true' });
      expect(await ledger.stored()).toEqual(['a']);
    });

    it('rolls back and commits once', async () => {
      const { url } = await ledger.serve(flavour, (app) => {
        const sub = express();
        sub.use(sessionMiddleware(ledger.knex));
        sub.get(
          '/refused',
          route(async (req, res) => void res.json(await insert(req, 'a', 'fail'))),
        );
        sub.get(
          '/thrown',
          route(async (req) => Promise.reject(await insert(req, 'a').then(() => new Error('mine')))),
        );
        sub.use(sessionErrorHandler());
        app.use('/sub', sub);
      });
      expect(await get(`${url}/sub/refused`)).toMatchObject({ status: 500, body: expect.stringContaining('23514') });
      expect(await get(`${url}/sub/thrown`)).toMatchObject({ status: 500, body: '{"message":"mine"}' });
      expect(await ledger.stored()).toEqual([]);
    });

    it.each([
      ['other options', () => sessionMiddleware(ledger.knex, { commitAt: 'end' })],
      ['another Knex', () => sessionMiddleware(ledger.pool())],
    ])('is a TypeError with %s, which says what to do', async (_, second) => {
      const { url, errors } = await ledger.serve(flavour, (app) => app.use(second()).use(tell));
      expect(await get(url)).toMatchObject({ status: 500 });
      expect(errors).toEqual([expect.any(TypeError)]);
      expect(errors[0].message).toMatch(/mounted twice.*'session'.*property/);
      expect(await ledger.stored()).toEqual([]);
    });
  });

  // Scenarios 73 and 76.
  describe('when the app has login sessions too', () => {
    const login = () => loginSession({ secret: 'secret', resave: false, saveUninitialized: true });

    it('says how to have both if req.session is taken', async () => {
      const app = express();
      const errors: any[] = [];
      app.use(login(), sessionMiddleware(ledger.knex), (_req: Request, res: Response) => void res.sendStatus(200));
      app.use(answerErrors(errors));
      const { url } = await ledger.listen(app);
      expect(await get(url)).toMatchObject({ status: 500 });
      expect(errors[0]).toBeInstanceOf(TypeError);
      expect(errors[0].message).toMatch(/req\.session is already set.*property: 'db'/);
    });

    it.each([['before'], ['after']])('works beside it under another property (express-session mounted %s)', async (place) => {
      const agent = keepAliveAgent();
      const app = express();
      const ours = sessionMiddleware(ledger.knex, { property: 'db' });
      app.use(...(place === 'before' ? [login(), ours] : [ours, login()]));
      app.get(
        '/:id',
        route(async (req: any, res) => {
          req.session.visits = (req.session.visits ?? 0) + 1;
          await req.db('notes').insert({ id: req.params.id, at_commit: req.query.at });
          res.json({ visits: req.session.visits });
        }),
      );
      app.use(sessionErrorHandler(), answerErrors([]));
      const { url } = await ledger.listen(app);

      const first = await get(`${url}/a`, { agent });
      expect(first).toMatchObject({ status: 200, body: '{"visits":1}' });
      const headers = { Cookie: String(first.headers['set-cookie']?.[0]?.split(';')[0]) };
      expect(await get(`${url}/b?at=fail`, { agent, headers })).toMatchObject({ status: 500, complete: true });
      expect(await get(`${url}/c`, { agent, headers })).toMatchObject({ status: 200, body: expect.stringContaining('visits') });
      expect(await ledger.stored()).toEqual(['a', 'c']);
      agent.destroy();
    });

    it.each(['destroy', 'save', 'regenerate', 'reload'])(
      "names the habit of req.session.%s(callback), and the app's pool lives on",
      async (habit) => {
        const { url, errors } = await serve(async (req, res) => {
          await insert(req, 'a');
          (req.session as any)[habit](() => res.sendStatus(200));
        });
        expect(await get(url)).toMatchObject({ status: 500 });
        expect(errors).toEqual([expect.any(SessionError)]);
        expect(errors[0].message).toMatch(/express-session/);
        expect(await ledger.stored()).toEqual([]);
        expect(await ledger.knex('notes').select()).toEqual([]);
      },
    );
  });

  // Scenario 36.
  describe('when requests run at the same time', () => {
    it('gives each a transaction of its own, which sees nothing of the others', async () => {
      const allAreHere = [barrier(5), barrier(5)] as const;
      const { url } = await serve(async (req, res) => {
        await insert(req, req.path);
        await allAreHere[0]();
        const { rows } = await req.session.raw('SELECT pg_current_xact_id()::text AS id, array_agg(id) AS sees FROM notes');
        // None has committed before.
        await allAreHere[1]();
        res.status(req.path === '/3' ? 409 : 200).json(rows[0]);
      });
      const answers = await Promise.all([0, 1, 2, 3, 4].map((i) => get(`${url}/${i}`)));
      const found = answers.map(({ body }) => JSON.parse(body));
      expect(new Set(found.map(({ id }) => id)).size).toBe(5);
      expect(found.map(({ sees }) => sees)).toEqual([0, 1, 2, 3, 4].map((i) => [`/${i}`]));
      expect(await ledger.stored()).toEqual(['/0', '/1', '/2', '/4']);
    });

    it('serves more of them than the pool has connections', async () => {
      const { url } = await serve(async (req, res) => {
        await insert(req, req.path);
        res.sendStatus(201);
      });
      const answers = await Promise.all(Array.from({ length: 50 }, (_, i) => get(`${url}/${i}`)));
      expect(new Set(answers.map(({ status }) => status))).toEqual(new Set([201]));
      expect(await ledger.stored()).toHaveLength(50);
      expect(poolUsage(ledger.knex)).toMatchObject({ used: 0, pendingAcquires: 0 });
    });
  });
});

/** Lets callers go on when that many have come. */
function barrier(count: number): () => Promise<void> {
  const waiting: (() => void)[] = [];
  return () =>
    new Promise((resolve) => {
      waiting.push(resolve);
      if (waiting.length === count) for (const go of waiting) go();
    });
}
