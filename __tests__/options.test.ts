import type { Express, Handler } from 'express';
import { getSession, type SessionOptions, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { optionDefinitions } from '../lib/resolve-options';
import { errorOf, startApp, useNotes } from './support/docs';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

const notes = useNotes();

const insertNote: Handler = async (req, res) => {
  await req.session('notes').insert({ text: 'x' });
  res.status(201).send('stored');
};

const using =
  (options: object, handler = insertNote) =>
  (app: Express) => {
    app.use(sessionMiddleware(notes.knex, options));
    app.get('/', handler);
    app.use(sessionErrorHandler());
  };

describe('when no options are given', () => {
  it('has the documented defaults', () => {
    const { shouldCommit, ...others } = optionDefinitions;
    expect(Object.fromEntries(Object.entries(others).map(([name, definition]) => [name, definition.default]))).toEqual({
      property: 'session',
      commitAt: 'head',
      isolationLevel: undefined,
      readOnly: undefined,
      deferrable: undefined,
      settings: undefined,
      role: undefined,
      transaction: true,
      onDisconnect: 'rollback',
      acquireTimeout: 5_000,
      transactionTimeout: 30_000,
      settleTimeout: 10_000,
      warnAfter: 0,
      context: false,
      onError: undefined,
    });
    const answers = [200, 304, 399, 400, 404, 500].map((statusCode) => shouldCommit.default({} as never, { statusCode } as never));
    expect(answers).toEqual([true, true, true, false, false, false]);
  });

  it('takes undefined for the default, option by option: as { commitAt: settings.commitAt } gives it', async () => {
    const options = Object.fromEntries(Object.keys(optionDefinitions).map((name) => [name, undefined]));
    const app = await startApp(using(options));
    expect((await app.get('/')).status).toBe(201);
    expect(await notes.stored()).toEqual(['x']);
    await app.close();
  });
});

describe('when the options object is changed after the middleware was made', () => {
  it('goes on with what it was given', async () => {
    const options: SessionOptions = { shouldCommit: () => false };
    const app = await startApp((app) => {
      app.use(sessionMiddleware(notes.knex, options));
      options.shouldCommit = () => true;
      options.property = 'db';
      app.get('/', insertNote);
    });
    expect((await app.get('/')).status).toBe(201);
    expect(await notes.stored()).toEqual([]);
    await app.close();
  });
});

describe('property', () => {
  it('is where the session is, and leaves req.session alone', async () => {
    const app = await startApp(
      using({ property: 'db' }, async (req, res) => {
        await getSession(req, 'db')('notes').insert({ text: 'x' });
        res.json({ session: typeof req.session, db: typeof (req as unknown as { db: unknown }).db });
      }),
    );
    expect((await app.get('/')).body).toBe('{"session":"undefined","db":"function"}');
    expect(await notes.stored()).toEqual(['x']);
    await app.close();
  });
});

describe('commitAt as a function of the request', () => {
  it('is asked once, at the first statement, and decides for this request only', async () => {
    const asked: string[] = [];
    const app = await startApp((app) => {
      app.use(
        sessionMiddleware(notes.knex, {
          commitAt: (req) => {
            asked.push(req.path);
            return req.path === '/export' ? 'end' : 'head';
          },
        }),
      );
      app.get('/unused', (_req, res) => res.send('unused'));
      app.get(['/export', '/other'], async (req, res) => {
        await req.session.raw('SELECT 1');
        await req.session.raw('SELECT 1');
        res.write('begun, ');
        await new Promise(setImmediate);
        await req.session.raw('SELECT 1').then(
          () => res.end('open'),
          (error) => res.end(error.code),
        );
      });
    });
    expect((await app.get('/unused')).body).toBe('unused');
    expect(asked).toEqual([]);
    expect((await app.get('/export')).body).toBe('begun, open');
    expect((await app.get('/other')).body).toBe('begun, ERR_SESSION_CLOSED');
    expect(asked).toEqual(['/export', '/other']);
    await app.close();
  });
});

// Scenario 13.
describe('shouldCommit', () => {
  it.each([
    [true, 422, ['x']],
    [false, 201, []],
  ])('is obeyed, and the response kept: %p with status %p', async (decision, status, stored) => {
    const app = await startApp(
      using({ shouldCommit: () => decision }, async (req, res) => {
        await req.session('notes').insert({ text: 'x' });
        res.status(status).send('kept');
      }),
    );
    expect(await app.get('/')).toMatchObject({ status, body: 'kept', complete: true });
    expect(await notes.stored()).toEqual(stored);
    await app.close();
  });

  it('is asked once, with the request and the status that will be sent', async () => {
    const asked: unknown[] = [];
    const shouldCommit: SessionOptions['shouldCommit'] = (req, res) => {
      asked.push([req.originalUrl, res.statusCode]);
      return true;
    };
    const app = await startApp((app) => {
      app.use(sessionMiddleware(notes.knex, { shouldCommit }));
      app.get('/head', async (req, res) => {
        await req.session('notes').insert({ text: 'head' });
        res.writeHead(202);
        res.write('a');
        res.end('b');
      });
      app.get('/unused', (_req, res) => res.send('unused'));
    });
    expect((await app.get('/head?x=1')).body).toBe('ab');
    expect((await app.get('/unused')).body).toBe('unused');
    expect(asked).toEqual([['/head?x=1', 202]]);
    await app.close();
  });

  it('has no say in a session that an error has rolled back', async () => {
    const { answer } = await errorOf(
      using({ shouldCommit: () => true }, async (req) => {
        await req.session('notes').insert({ text: 'thrown' });
        throw new Error('of the handler');
      }),
    );
    expect(answer.status).toBe(500);
    expect(await notes.stored()).toEqual([]);
  });
});

describe('onError', () => {
  const failing: Handler = async (req, res) => {
    const { rows } = await req.session.raw('SELECT pg_backend_pid() AS pid');
    // COMMIT will fail after the response: nobody but onError can be told.
    await notes.database.admin.raw('SELECT pg_terminate_backend(?)', rows[0].pid);
    res.send('sent');
  };

  it('receives what no one else can, with the request', async () => {
    const onError = jest.fn();
    const app = await startApp(using({ commitAt: 'finish', onError }, failing));
    expect((await app.get('/')).body).toBe('sent');
    await eventually(() => expect(onError).toHaveBeenCalledTimes(1));
    expect(onError).toHaveBeenCalledWith(expect.any(Error), expect.objectContaining({ originalUrl: '/' }));
    expect(app.errors).toEqual([]);
    await eventually(() => expect(poolUsage(notes.knex).used).toBe(0));
    await app.close();
  });

  function loggingKnex(): { knex: Knex; lines: string[] } {
    const lines: string[] = [];
    const log = { error: (line: string) => lines.push(line), warn: () => {} };
    return { knex: notes.database.knex({ log }), lines };
  }

  it("is Knex's logger by default", async () => {
    const { knex, lines } = loggingKnex();
    const app = await startApp((app) => app.use(sessionMiddleware(knex, { commitAt: 'finish' })).get('/', failing));
    await app.get('/');
    await eventually(() => expect(lines).toEqual([expect.stringContaining('Error')]));
    await app.close();
  });

  it('loses neither error if it throws itself', async () => {
    const { knex, lines } = loggingKnex();
    const onError = () => {
      throw new Error('of onError');
    };
    const app = await startApp((app) => app.use(sessionMiddleware(knex, { commitAt: 'finish', onError })).get('/', failing));
    await app.get('/');
    await eventually(() => expect(lines).toHaveLength(2));
    expect(lines.filter((line) => line.includes('of onError'))).toHaveLength(1);
    await app.close();
  });

  it('loses nothing, and leaves no unhandled rejection, if it is async and rejects', async () => {
    const { knex, lines } = loggingKnex();
    const onError = async () => {
      throw new Error('of onError');
    };
    const app = await startApp((app) => app.use(sessionMiddleware(knex, { commitAt: 'finish', onError })).get('/', failing));
    await app.get('/');
    await eventually(() => expect(lines.join()).toContain('of onError'));
    await app.close();
  });

  it('is taken by withSession too: the error of a ROLLBACK goes there, that of the work to the caller', async () => {
    const onError = jest.fn();
    const thrown = new Error('of the work');
    const call = withSession(
      notes.knex,
      async (session) => {
        const { rows } = await session.raw('SELECT pg_backend_pid() AS pid');
        await notes.database.admin.raw('SELECT pg_terminate_backend(?)', rows[0].pid);
        throw thrown;
      },
      { onError },
    );
    await expect(call).rejects.toBe(thrown);
    for (const [error] of onError.mock.calls) expect(error).toBeInstanceOf(Error);
    expect(poolUsage(notes.knex).used).toBe(0);
  });
});

describe('when an option of one request gives nonsense', () => {
  it.each<[string, object, RegExp]>([
    ['another value', { commitAt: () => 'begin' }, /^Expected `commitAt` to return 'head', 'end' or 'finish', got 'begin'/],
    ['nothing', { commitAt: () => {} }, /^Expected `commitAt` to return 'head', 'end' or 'finish', got undefined/],
    ['a promise', { commitAt: async () => 'end' }, /^Expected `commitAt` to return .*, got .*promise.*at once/i],
  ])('refuses the first statement: commitAt gives %s', async (_case, options, message) => {
    const { answer, error } = await errorOf(using(options));
    expect(answer.status).toBe(500);
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toMatch(message);
    expect(await notes.stored()).toEqual([]);
  });

  // A success for work that was thrown away would be a lie.
  it.each<[string, object, RegExp]>([
    ['nothing (a forgotten return)', { shouldCommit: () => {} }, /^Expected `shouldCommit` to return true or false, got undefined/],
    ['a word', { shouldCommit: () => 'rollback' }, /^Expected `shouldCommit` to return true or false, got 'rollback'/],
    ['a promise', { shouldCommit: async () => true }, /^Expected `shouldCommit` to return true or false, got .*promise.*at once/i],
  ])('rolls back and answers with an error: shouldCommit gives %s', async (_case, options, message) => {
    const { answer, error } = await errorOf(using(options));
    expect(answer.status).toBe(500);
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toMatch(message);
    expect(await notes.stored()).toEqual([]);
    expect(poolUsage(notes.knex).used).toBe(0);
  });

  it('hands on what an option throws', async () => {
    const thrown = new Error('of the option');
    const fails = () => {
      throw thrown;
    };
    expect((await errorOf(using({ commitAt: fails }))).error).toBe(thrown);
    expect((await errorOf(using({ shouldCommit: fails }))).error).toBe(thrown);
    expect(await notes.stored()).toEqual([]);
    expect(poolUsage(notes.knex).used).toBe(0);
  });
});
