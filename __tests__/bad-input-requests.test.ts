import type { Express, Handler } from 'express';
import {
  getSession,
  type Session,
  SessionClosedError,
  SessionError,
  sessionErrorHandler,
  sessionMiddleware,
  withSession,
} from 'express-knex-session';
import { errorOf, mistaken, startApp, useNotes } from './support/docs';
import { expressSession } from './support/express-session';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

const notes = useNotes();

describe('when a function is mounted instead of being called', () => {
  it('says so at the first request: app.use(sessionMiddleware)', async () => {
    const { answer, error } = await errorOf((app) => app.use(mistaken(sessionMiddleware)));
    expect(answer.status).toBe(500);
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toContain('Did you mean app.use(sessionMiddleware(knex))?');
  });

  it('says so at the first error, and stores nothing: app.use(sessionErrorHandler)', async () => {
    const app = await startApp((app) => {
      app.use(sessionMiddleware(notes.knex));
      app.post('/', async (req) => {
        await req.session('notes').insert({ text: 'x' });
        throw new Error('of the handler');
      });
      app.use(mistaken(sessionErrorHandler));
    });
    expect((await app.post('/')).status).toBe(500);
    expect(app.errors).toEqual([expect.any(TypeError)]);
    expect(app.errors[0].message).toContain('app.use(sessionErrorHandler())');
    // Nobody should have to look for their own error.
    expect(app.errors[0].cause).toEqual(new Error('of the handler'));
    expect(await notes.stored()).toEqual([]);
    await app.close();
  });
});

describe('when sessionErrorHandler() is mounted before the routes', () => {
  it('never sees their errors, but a response that says error is rolled back all the same', async () => {
    const app = await startApp((app) => {
      app.use(sessionMiddleware(notes.knex));
      app.use(sessionErrorHandler());
      app.post('/', async (req) => {
        await req.session('notes').insert({ text: 'x' });
        throw new Error('of the handler');
      });
    });
    expect((await app.post('/')).status).toBe(500);
    expect(await notes.stored()).toEqual([]);
    await app.close();
  });
});

// Scenario 73, hazard 29.
describe('when the property is taken', () => {
  const takenBy = (property: string) => (app: Express) => {
    app.use((req, _res, next) => {
      // Most of these are Express's own.
      (req as unknown as Record<string, unknown>)[property] ??= { id: 1 };
      next();
    });
    app.use(sessionMiddleware(notes.knex, { property }));
    app.get('/', (_req, res) => res.send('served'));
  };

  it('names express-session and the way to have both: req.session', async () => {
    const { answer, error } = await errorOf(takenBy('session'));
    expect(answer.status).toBe(500);
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toMatch(/^req\.session is already set .*express-session.*sessionMiddleware\(knex, \{ property: 'db' \}\)/);
  });

  it.each(['db', 'params', 'query', 'res'])('does not advise what has just failed: req.%s', async (property) => {
    const { error } = await errorOf(takenBy(property));
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toMatch(new RegExp(`^req\\.${property} is already set`));
    expect(error.message).not.toContain(`property: '${property}'`);
    expect(error.message).not.toContain('express-session?');
  });

  it('is what an app with express-session sees, and the advice works', async () => {
    const login = expressSession({ secret: 'x', resave: false, saveUninitialized: true });
    const { error } = await errorOf((app) => app.use(login, sessionMiddleware(notes.knex)));
    expect(error.message).toContain("{ property: 'db' }");

    const app = await startApp((app) => {
      app.use(login, sessionMiddleware(notes.knex, { property: 'db' }));
      app.post('/', async (req, res) => {
        await getSession(req, 'db')('notes').insert({ text: (req as unknown as { session: { id: string } }).session.id });
        res.status(201).end();
      });
    });
    expect(await app.post('/')).toMatchObject({ status: 201, headers: { 'set-cookie': [expect.stringMatching(/^connect\.sid=/)] } });
    expect(await notes.stored()).toEqual([expect.any(String)]);
    await app.close();
  });
});

// Scenario 34. That the same options are no mistake is tested with the middleware.
describe('when the middleware is mounted twice with the same property', () => {
  it.each<[string, () => Handler]>([
    ['other options', () => sessionMiddleware(notes.knex, { commitAt: 'end' })],
    ['another Knex instance', () => sessionMiddleware(notes.database.admin)],
    ['a function of its own', () => sessionMiddleware(notes.knex, { shouldCommit: () => true })],
  ])('says what differs and what to do: %s', async (_case, second) => {
    const { answer, error } = await errorOf((app) => app.use(sessionMiddleware(notes.knex), second()));
    expect(answer.status).toBe(500);
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toMatch(
      /mounted twice with the property 'session' and another Knex instance or other options.*Mount it once, or .*property/,
    );
  });
});

// Scenario 33.
describe('when there is no session', () => {
  it.each<[string, unknown, string]>([
    ['no request', undefined, 'nothing'],
    ['a request without the middleware', {}, 'nothing'],
    ['a login session', { session: { cookie: {} } }, 'something else'],
    ['a plain Knex instance, put there by hand', { session: () => {} }, 'something else'],
  ])('getSession names the middleware: %s', (_case, req, found) => {
    const call = () => getSession(mistaken(req));
    expect(call).toThrow(SessionError);
    expect(call).toThrow(expect.objectContaining({ code: 'ERR_SESSION_MISSING', status: 500 }));
    expect(call).toThrow(new RegExp(`on req\\.session, found ${found}.*app\\.use\\(sessionMiddleware\\(knex\\)\\) before this route`));
  });

  it('getSession names the property that was asked for', async () => {
    const { error } = await errorOf((app) => {
      app.use(sessionMiddleware(notes.knex, { property: 'db' }));
      app.get('/', (req) => void getSession(req));
    });
    expect(error.message).toMatch(/req\.session, found nothing.*the property that it was given/);
  });
});

// Scenarios 17 and 32.
describe('when a session is used after its end', () => {
  async function closedBy(end: (session: Session) => unknown): Promise<SessionError> {
    let session!: Session;
    await withSession(notes.knex, async (given) => {
      session = given;
      await session('notes').insert({ text: 'x' });
      await end(session);
    }).catch(() => {});
    const error = await session('notes').then(
      () => undefined,
      (error) => error,
    );
    expect(error).toBeInstanceOf(SessionClosedError);
    expect(error).toMatchObject({ code: 'ERR_SESSION_CLOSED', status: 500 });
    return error;
  }

  it.each<[string, (session: Session) => unknown, RegExp]>([
    ['withSession() has returned', () => {}, /withSession\(\) has ended\. Await every statement before its callback returns/],
    ['withSession() has failed', () => Promise.reject(new Error()), /rolled back by an error/],
    ['session.commit()', (session) => session.commit(), /session\.commit\(\).*(last|withSession)/],
    ['session.rollback()', (session) => session.rollback(), /session\.rollback\(\).*(last|withSession)/],
  ])('says what ended it, and what to do: %s', async (_case, end, advice) => {
    expect((await closedBy(end)).message).toMatch(advice);
  });

  it('says that the response has ended, and names withSession for the work after it', async () => {
    let late!: Promise<unknown>;
    const app = await startApp((app) => {
      app.use(sessionMiddleware(notes.knex));
      app.get('/', async (req, res) => {
        await req.session.raw('SELECT 1');
        late = new Promise((resolve) => {
          res.once('close', () =>
            resolve(
              req
                .session('notes')
                .insert({ text: 'late' })
                .catch((error) => error),
            ),
          );
        });
        res.end();
      });
    });
    await app.get('/');
    const error = await late;
    expect(error).toBeInstanceOf(SessionClosedError);
    expect((error as Error).message).toMatch(/the response has ended\. Await every statement before you send.*withSession\(\)/);
    expect(await notes.stored()).toEqual([]);
    await app.close();
  });

  it("says that the response has begun, and names commitAt: 'end'", async () => {
    const app = await startApp((app) => {
      app.use(sessionMiddleware(notes.knex));
      app.get('/', async (req, res) => {
        await req.session.raw('SELECT 1');
        res.write('first');
        await eventually(() => expect(poolUsage(notes.knex).used).toBe(0));
        await req.session.raw('SELECT 1').catch((error) => res.end(error.message));
      });
    });
    const answer = await app.get('/');
    expect(answer.status).toBe(200);
    expect(answer.body).toMatch(/^first.*the response has begun.*\{ commitAt: 'end' \}/);
    await app.close();
  });

  // Scenario 15.
  it('refuses commit() after setRollbackOnly(), and keeps the reason', async () => {
    const error = await withSession(notes.knex, async (session) => {
      await session('notes').insert({ text: 'x' });
      session.setRollbackOnly('dry run');
      return session.commit().catch((error: unknown) => error);
    });
    expect(error).toMatchObject({ code: 'ERR_ROLLBACK_ONLY', status: 500, cause: 'dry run' });
    expect((error as Error).message).toMatch(/session\.commit\(\).*after session\.setRollbackOnly\(\)/);
    expect(await notes.stored()).toEqual([]);
  });
});

// Scenario 76, hazard 32.
describe('when it is taken for a login session, or for Knex itself', () => {
  it.each(['save', 'regenerate', 'reload', 'touch'])('session.%s() says what it is and how to have both', async (method) => {
    const call = withSession(notes.knex, (session) => (session as any)[method](() => {}));
    await expect(call).rejects.toMatchObject({ code: 'ERR_NOT_A_LOGIN_SESSION', status: 500 });
    await expect(call).rejects.toThrow(/database session, not a login session.*\{ property: 'db' \}/);
  });

  it('session.cookie.maxAge = ... says the same', async () => {
    const call = withSession(notes.knex, (session) => {
      (session as any).cookie.maxAge = 1;
    });
    await expect(call).rejects.toMatchObject({ code: 'ERR_NOT_A_LOGIN_SESSION' });
  });

  it.each(['destroy', 'initialize'])('session.%s() is refused by name, and the pool lives', async (method) => {
    const call = withSession(notes.knex, async (session) => {
      await session('notes').insert({ text: 'x' });
      await (session as any)[method](() => {});
    });
    await expect(call).rejects.toMatchObject({ code: 'ERR_SESSION_DESTROY', status: 500 });
    await expect(call).rejects.toThrow(/no connection pool.*session\.commit\(\) or session\.rollback\(\).*express-session/);
    expect(await notes.stored()).toEqual([]);
    expect(await notes.knex('notes')).toEqual([]);
  });

  it('the same holds in a savepoint of it', async () => {
    const call = withSession(notes.knex, (session) => session.transaction((savepoint) => savepoint.destroy()));
    await expect(call).rejects.toMatchObject({ code: 'ERR_SESSION_DESTROY' });
    expect(await notes.knex('notes')).toEqual([]);
  });

  it('can be logged: nothing of it throws when it is looked at', () =>
    withSession(notes.knex, (session) => {
      expect(require('node:util').inspect(session, { depth: 3 })).toContain('session');
      expect(JSON.stringify({ session })).toBe('{}');
      expect(`${Object.keys(session)}`).not.toContain('cookie');
    }));
});
