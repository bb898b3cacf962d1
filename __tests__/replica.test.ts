import express, { type ErrorRequestHandler, type Express, type Request, type RequestHandler } from 'express';
import { getSession, type Session, sessionErrorHandler, sessionMiddleware, sessionOptions } from 'express-knex-session';
import createKnex, { type Knex } from 'knex';
import { createDatabase, type TestDatabase } from './support/database';
import { errorOf, startApp } from './support/docs';
import { caught } from './support/knex';
import { useRestartableServer } from './support/matrix-postgres';
import { eventually, poolUsage } from './support/pool';
import { type Replica, startReplica } from './support/replica';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();

describe('when each request chooses its Knex', () => {
  const databases = {} as Record<'one' | 'two', TestDatabase>;
  const knexes = {} as Record<'one' | 'two', Knex>;
  const asked: string[] = [];
  const byTenant = (req: Request): Knex => {
    asked.push(req.originalUrl);
    return knexes[req.query['tenant'] as 'one' | 'two'];
  };

  beforeAll(async () => {
    for (const name of ['one', 'two'] as const) {
      databases[name] = await createDatabase();
      await databases[name].admin.raw('CREATE TABLE notes (text text UNIQUE DEFERRABLE INITIALLY DEFERRED)');
    }
  });
  beforeEach(async () => {
    for (const name of ['one', 'two'] as const) {
      await databases[name].admin('notes').del();
      knexes[name] = databases[name].knex();
    }
    asked.length = 0;
  });
  afterAll(async () => {
    for (const database of Object.values(databases)) await database.drop();
  });
  const stored = async () => ({
    one: await databases.one.admin('notes').pluck('text'),
    two: await databases.two.admin('notes').pluck('text'),
  });

  const insert: RequestHandler = async (req, res) => {
    await req.session('notes').insert({ text: String(req.query['text'] ?? req.query['tenant']) });
    res.status(201).end();
  };
  const withHandlers =
    (...handlers: RequestHandler[]) =>
    (app: Express): void => {
      app.use(sessionMiddleware(byTenant));
      app.get('/', ...handlers);
      app.use(sessionErrorHandler());
    };

  it('works in the database of each, also at the same time (68)', async () => {
    const app = await startApp(withHandlers(insert));
    const texts = Array.from({ length: 20 }, (_, i) => `${i}`);
    const answers = await Promise.all(texts.map((text) => app.get(`/?tenant=${Number(text) % 2 ? 'one' : 'two'}&text=${text}`)));
    expect(new Set(answers.map(({ status }) => status))).toEqual(new Set([201]));
    const { one, two } = await stored();
    expect([one, two].map((rows) => rows.map(Number).sort((a, b) => a - b))).toEqual([
      texts.map(Number).filter((n) => n % 2 === 1),
      texts.map(Number).filter((n) => n % 2 === 0),
    ]);
    await app.close();
  });

  it('asks when the session is first touched, once, and not for a request that never does', async () => {
    const app = await startApp((app) => {
      app.use(sessionMiddleware(byTenant), sessionOptions({ isolationLevel: 'serializable' }));
      app.get('/unused', (_req, res) => res.send('unused'));
      // As a login would: what is chosen by is known later than the middleware runs.
      app.get('/', (req, _res, next) => {
        Object.defineProperty(req, 'query', { value: { tenant: 'two' }, configurable: true });
        expect(asked).toEqual([]);
        next();
      });
      app.get('/', async (req, res) => {
        const { session } = req;
        // Too late to change anything.
        Object.defineProperty(req, 'query', { value: { tenant: 'one' } });
        expect(req.session).toBe(session);
        await session('notes').insert({ text: 'x' });
        const { rows } = await getSession(req).raw('show transaction_isolation');
        res.json(rows);
      });
    });
    expect((await app.get('/unused')).body).toBe('unused');
    expect((await app.get('/')).body).toBe('[{"transaction_isolation":"serializable"}]');
    expect(asked).toEqual(['/']);
    expect(await stored()).toEqual({ one: [], two: ['x'] });
    await app.close();
  });

  it('takes no connection for a session that is only looked at', async () => {
    const app = await startApp(withHandlers((req, res) => res.json(typeof req.session.raw)));
    expect((await app.get('/?tenant=one')).body).toBe('"function"');
    expect(poolUsage(knexes.one)).toEqual({ used: 0, free: 0, pendingAcquires: 0 });
    await app.close();
  });

  it('rolls back where it wrote: an error, and a COMMIT that fails', async () => {
    const failing: RequestHandler = async (req, res) => {
      await req.session('notes').insert([{ text: 'twice' }, { text: req.query['tenant'] === 'one' ? 'once' : 'twice' }]);
      if (req.query['tenant'] === 'one') throw new Error('of the handler');
      res.status(201).end();
    };
    const app = await startApp(withHandlers(failing));
    expect([(await app.get('/?tenant=one')).status, (await app.get('/?tenant=two')).status]).toEqual([500, 500]);
    expect(app.errors).toMatchObject([{ message: 'of the handler' }, { code: '23505' }]);
    expect(await stored()).toEqual({ one: [], two: [] });
    await app.close();
  });

  it('is a savepoint where a Knex.Transaction is chosen', async () => {
    await knexes.one
      .transaction(async (outer) => {
        const app = await startApp((app) => {
          app.use(sessionMiddleware(() => outer));
          app.get('/', insert);
        });
        expect((await app.get('/?text=x')).status).toBe(201);
        expect(await outer('notes').pluck('text')).toEqual(['x']);
        await app.close();
        throw new Error('of the test');
      })
      .catch(() => {});
    expect(await stored()).toEqual({ one: [], two: [] });
  });

  it('is not chosen for a request that fails before, and a statement of its error handler is refused', async () => {
    let refused: unknown;
    const app = express();
    app.use(sessionMiddleware(byTenant));
    app.get('/', (_req, _res, next) => next(new Error('early')));
    app.use(sessionErrorHandler());
    const handleError: ErrorRequestHandler = async (_error, req, res, _next) => {
      expect(asked).toEqual([]);
      refused = await caught(req.session('notes').insert({ text: 'x' }));
      res.status(200).send('handled');
    };
    app.use(handleError);
    const running = await startApp((outer) => outer.use(app));
    expect((await running.get('/?tenant=one')).body).toBe('handled');
    expect(refused).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    expect(await stored()).toEqual({ one: [], two: [] });
    await running.close();
  });

  it('is drained with all its databases', async () => {
    const sessions = sessionMiddleware(byTenant);
    const begun = [deferred(), deferred()];
    const goOn = deferred();
    let arrived = 0;
    const app = await startApp((app) => {
      app.use(sessions);
      app.get('/', async (req, res, next) => {
        await req.session('notes');
        begun[arrived++]?.resolve();
        await goOn.promise;
        return insert(req, res, next);
      });
    });
    const answers = Promise.all(['one', 'two'].map((tenant) => app.get(`/?tenant=${tenant}`)));
    await Promise.all(begun.map(({ promise }) => promise));
    expect(sessions.stats()).toMatchObject({ open: 2 });
    const drained = sessions.drain(5_000);
    goOn.resolve();
    await drained;
    expect(sessions.stats()).toMatchObject({ open: 0, committed: 2 });
    expect((await answers).map(({ status }) => status)).toEqual([201, 201]);
    expect((await app.get('/?tenant=one')).status).toBe(503);
    await app.close();
  });

  it('is one session if it is mounted twice with the same function, and a TypeError with another', async () => {
    const mount = (...more: unknown[]) =>
      errorOf((app) => {
        app.use(sessionMiddleware(byTenant), ...more.map((knex) => sessionMiddleware(knex as never)));
        app.get('/', (req, _res, next) => {
          Object.defineProperty(req, 'query', { value: { tenant: 'one' } });
          next(new Error(`chosen: ${asked.length}, ${typeof req.session}, ${asked.length}`));
        });
      });
    expect((await mount(byTenant, byTenant)).error.message).toBe('chosen: 0, function, 1');
    for (const other of [() => knexes.one, knexes.one]) {
      const { error } = await mount(other);
      expect(error).toBeInstanceOf(TypeError);
      expect(error.message).toMatch(/^sessionMiddleware is mounted twice with the property 'session'/);
    }
  });

  it.each<[string, () => unknown, RegExp]>([
    ['nothing', () => undefined, /^Expected the function `knex` to return a Knex instance, got undefined\./],
    ['a promise', async () => knexes.one, /got a promise\. Await it first\.$/],
    ['a promise that rejects', async () => Promise.reject(new Error('late')), /got a promise\. Await it first\.$/],
    ['a URL', () => 'postgres://me:secret@host/db', /got a string\. (?!.*secret)/],
    ['its configuration', () => ({ client: 'pg' }), /got its configuration\./],
    ['the maker of instances', () => createKnex, /got a function .*Call it/],
    ['the request', (req?: unknown) => req, /got IncomingMessage\./],
  ])('names what is none, before anything runs: %s', async (_case, choose, message) => {
    const { answer, error } = await errorOf((app) => {
      app.use(sessionMiddleware(choose as never));
      app.get('/', insert);
      app.use(sessionErrorHandler());
    });
    expect(answer.status).toBe(500);
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toMatch(message);
  });

  it('passes on what the function throws, untouched', async () => {
    const thrown = new Error('no such tenant');
    const { error } = await errorOf((app) => {
      app.use(
        sessionMiddleware(() => {
          throw thrown;
        }),
      );
      app.get('/', insert);
    });
    expect(error).toBe(thrown);
  });
});

// The last of this file: its databases are on a server of its own.
describe('when reads go to a replica, and writes to the primary', () => {
  const server = useRestartableServer();
  let database: TestDatabase;
  let replica: Replica;
  let primaryKnex: Knex;
  let replicaKnex: Knex;
  const app = express();

  beforeAll(async () => {
    database = await createDatabase();
    replica = await startReplica(database.adminUrl);
    await database.admin.raw('CREATE TABLE notes (text text)');
    primaryKnex = database.knex();
    replicaKnex = database.knex({ connection: replica.urlOf(database.url) });
    const isRead = (req: Request) => req.method === 'GET';
    app.use(sessionMiddleware((req) => (isRead(req) ? replicaKnex : primaryKnex), { readOnly: (req) => isRead(req) || undefined }));
    app.get('/cheap', sessionOptions({ transaction: false }));
    app.get('/read-write', sessionOptions({ readOnly: false }));
    app.get('/serializable', sessionOptions({ isolationLevel: 'serializable' }));
    app.get('/settings', sessionOptions({ settings: { 'app.tenant': 'a' } }));
    app.use(async (req, res) => {
      if (req.query['text']) await req.session('notes').insert({ text: req.query['text'] });
      res.json({ ...(await whereAmI(req.session)), notes: await req.session('notes').pluck('text') });
    });
    app.use(sessionErrorHandler());
  }, 60_000);
  beforeEach(async () => {
    await database.admin('notes').del();
    await replica.caughtUp();
  });
  afterAll(async () => {
    await replicaKnex.destroy();
    await replica.stop();
    await database.drop();
    await server.stop();
  });
  const whereAmI = async (session: Session) =>
    (await session.raw("select pg_is_in_recovery() as replica, current_setting('transaction_read_only') as read_only")).rows[0];

  it('serves a GET by the replica, READ ONLY, and a POST by the primary', async () => {
    const running = await startApp((outer) => outer.use(app));
    expect(JSON.parse((await running.post('/?text=x')).body)).toEqual({ replica: false, read_only: 'off', notes: ['x'] });
    await replica.caughtUp();
    for (const path of ['/', '/settings', '/cheap']) {
      expect(JSON.parse((await running.get(path)).body)).toEqual({ replica: true, read_only: 'on', notes: ['x'] });
    }
    await eventually(() => expect([poolUsage(primaryKnex).used, poolUsage(replicaKnex).used]).toEqual([0, 0]));
    await running.close();
  });

  it.each(['/', '/cheap'])('refuses the write of a GET: 25006 (%s)', async (path) => {
    const running = await startApp((outer) => outer.use(app));
    expect((await running.get(`${path}?text=x`)).status).toBe(500);
    expect(running.errors).toMatchObject([{ code: '25006' }]);
    expect(await database.admin('notes')).toEqual([]);
    await running.close();
  });

  it.each(['/read-write', '/serializable'])('sends no success where the replica refuses to begin: %s', async (path) => {
    const running = await startApp((outer) => outer.use(app));
    expect((await running.get(path)).status).toBeGreaterThanOrEqual(500);
    expect(running.errors).toMatchObject([{ cause: { code: '0A000' } }]);
    expect((await running.get('/')).status).toBe(200);
    await running.close();
  });
});
