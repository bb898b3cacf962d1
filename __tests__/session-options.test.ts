import express, { type Request, type RequestHandler, type Response, Router } from 'express';
import { type SessionOptions, sessionErrorHandler, sessionMiddleware, sessionOptions } from 'express-knex-session';
import { errorOf, mistaken, startApp, useNotes } from './support/docs';
import { caught } from './support/knex';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const notes = useNotes();

const MODES = "select current_setting('transaction_isolation') as isolation, current_setting('transaction_read_only') as read_only";
const showModes: RequestHandler = async (req, res) => {
  const { rows } = await req.session.raw(MODES);
  res.json(rows[0]);
};
const insert: RequestHandler = async (req, res) => {
  await req.session('notes').insert({ text: 'x' });
  res.status(201).send('stored');
};
const statement: RequestHandler = async (req, _res, next) => {
  await req.session.raw('select 1');
  next();
};

/** An app with these handlers on one route, after the middleware. */
const routed =
  (...handlers: RequestHandler[]) =>
  (app: express.Express): void => {
    app.use(sessionMiddleware(notes.knex, { isolationLevel: 'repeatable read' }));
    app.get('/', ...handlers);
    app.use(sessionErrorHandler());
  };

describe('when a route has options of its own', () => {
  it('changes those that it names for its own requests, and leaves the others as they are (64)', async () => {
    const app = await startApp((app) => {
      app.use(sessionMiddleware(notes.knex, { isolationLevel: 'repeatable read' }));
      app.get('/own', sessionOptions({ readOnly: true }), showModes);
      app.get('/twice', sessionOptions({ readOnly: true, isolationLevel: 'serializable' }), sessionOptions({ readOnly: false }), showModes);
      app.get('/undefined', sessionOptions({ isolationLevel: undefined }), showModes);
      app.get('/', showModes);
    });
    const bodies = await Promise.all(['/own', '/', '/twice', '/undefined'].map(async (path) => JSON.parse((await app.get(path)).body)));
    expect(bodies).toEqual([
      { isolation: 'repeatable read', read_only: 'on' },
      { isolation: 'repeatable read', read_only: 'off' },
      { isolation: 'serializable', read_only: 'off' },
      { isolation: 'repeatable read', read_only: 'off' },
    ]);
    await app.close();
  });

  it("adds its settings to the application's, and wins over them: what row-level security reads is not lost", async () => {
    const NAMES = ['app.tenant', 'app.user', 'app.route'];
    const show = NAMES.map((name) => `current_setting('${name}', true)`).join(", ' ', ");
    const app = await startApp((app) => {
      app.use(sessionMiddleware(notes.knex, { settings: (req) => ({ 'app.tenant': String(req.query['tenant']), 'app.user': 'nobody' }) }));
      const outer = sessionOptions({ settings: { 'app.user': 'outer', 'app.route': 'outer' } });
      const inner = sessionOptions({ settings: (req) => ({ 'app.route': req.path }) });
      app.get('/inner', outer, inner, async (req, res) => {
        const { rows } = await req.session.raw(`select concat(${show}) as seen`);
        res.send(rows[0].seen);
      });
    });
    expect((await app.get('/inner?tenant=a')).body).toBe('a outer /inner');
    await app.close();
  });

  it('holds in routers, sub-apps, and where the session has not been touched', async () => {
    const app = await startApp((app) => {
      app.use(sessionMiddleware(() => notes.knex));
      const router = Router()
        .use(sessionOptions({ readOnly: true }))
        .get('/', showModes);
      app.use('/router', router);
      app.use('/app', express().use(router));
    });
    for (const path of ['/router', '/app']) expect(JSON.parse((await app.get(path)).body)).toMatchObject({ read_only: 'on' });
    await app.close();
  });

  it.each<[string, SessionOptions, RequestHandler, object]>([
    ['shouldCommit', { shouldCommit: () => false }, insert, { status: 201, stored: [] }],
    [
      'commitAt',
      { commitAt: 'end' },
      async (req, res) => {
        res.write('begun, ');
        await req.session('notes').insert({ text: 'x' });
        res.end('ended');
      },
      { status: 200, stored: ['x'] },
    ],
    [
      'transactionTimeout',
      { transactionTimeout: 30 },
      async (req, res) => {
        await req.session('notes').insert({ text: 'x' });
        await caught(req.session.raw('select pg_sleep(5)'));
        res.end();
      },
      { status: 503, stored: [] },
    ],
  ])('obeys the option %s of the route', async (_name, options, handler, expected) => {
    const app = await startApp(routed(sessionOptions(options), handler));
    const { status } = await app.get('/');
    expect({ status, stored: await notes.stored() }).toEqual(expected);
    await app.close();
  });

  it('costs nothing where no statement is run', async () => {
    const asked = jest.fn();
    const knex = notes.database.knex();
    const app = await startApp((app) => {
      app.use(sessionMiddleware(knex));
      app.get('/', sessionOptions({ settings: asked, readOnly: asked }), (_req, res) => res.send('unused'));
    });
    expect((await app.get('/')).body).toBe('unused');
    expect(asked).not.toHaveBeenCalled();
    expect(poolUsage(knex)).toEqual({ used: 0, free: 0, pendingAcquires: 0 });
    await app.close();
  });
});

describe('when sessionOptions() comes after the first statement', () => {
  const late = sessionOptions({ settings: { 'app.tenant': 'a' } });

  it.each<[string, RequestHandler[]]>([
    ['a statement', [statement]],
    [
      'a statement that nobody has awaited',
      [
        (req, _res, next) => {
          void req.session('notes').insert({ text: 'y' }).then();
          setImmediate(next);
        },
      ],
    ],
    [
      'a statement that has failed',
      [
        async (req, _res, next) => {
          await caught(req.session('nowhere'));
          next();
        },
      ],
    ],
    [
      'commit()',
      [
        async (req, _res, next) => {
          await req.session.commit();
          next();
        },
      ],
    ],
    [
      'a checkpoint',
      [
        statement,
        async (req, _res, next) => {
          await req.session.checkpoint();
          next();
        },
      ],
    ],
    ['a savepoint', [async (req, _res, next) => req.session.transaction(async () => {}).then(() => next())]],
    ['a statement without a transaction', [sessionOptions({ transaction: false }), statement]],
  ])('is a named error, and no success is sent: after %s (65)', async (_what, before) => {
    const { answer, error } = await errorOf(routed(...before, late, insert));
    expect(error).toMatchObject({ code: 'ERR_SESSION_OPTIONS', message: expect.stringContaining('after the first statement') });
    expect(answer.status).toBe(500);
    expect(await notes.stored()).toEqual([]);
  });

  it('rolls back what came before, even if the error handler sends a success', async () => {
    const store: RequestHandler = (req, _res, next) =>
      req
        .session('notes')
        .insert({ text: 'y' })
        .then(() => next(), next);
    const app = await startApp(routed(store, late, insert), 200);
    await app.get('/');
    expect(app.errors).toMatchObject([{ code: 'ERR_SESSION_OPTIONS' }]);
    expect(await notes.stored()).toEqual([]);
    await app.close();
  });
});

describe('when settings were added before the options of the route', () => {
  const set: RequestHandler = async (req, _res, next) => {
    await req.session.set({ 'app.tenant': 'a' });
    next();
  };

  it('takes both', async () => {
    const app = await startApp(
      routed(set, sessionOptions({ readOnly: true }), async (req, res) => {
        const { rows } = await req.session.raw(`${MODES}, current_setting('app.tenant') as tenant`);
        res.json(rows[0]);
      }),
    );
    expect(JSON.parse((await app.get('/')).body)).toEqual({ isolation: 'repeatable read', read_only: 'on', tenant: 'a' });
    await app.close();
  });

  it('never runs a statement without them, if the route wants no transaction', async () => {
    const { answer, error } = await errorOf(routed(set, sessionOptions({ transaction: false }), insert));
    expect(error).toMatchObject({ code: 'ERR_SESSION_OPTIONS', message: expect.stringContaining('transaction: false') });
    expect(answer.status).toBe(500);
    expect(await notes.stored()).toEqual([]);
  });
});

describe('when a request has two sessions', () => {
  const two =
    (...handlers: RequestHandler[]) =>
    (app: express.Express): void => {
      app.use(
        sessionMiddleware(notes.knex),
        sessionMiddleware(() => notes.knex, { property: 'db' }),
      );
      app.get('/', ...handlers);
    };
  const both = async (req: Request, res: Response): Promise<void> => {
    const { db } = req as unknown as { db: typeof req.session };
    const modes = async (session: typeof db) => (await session.raw(MODES)).rows[0].read_only;
    res.json([await modes(req.session), await modes(db)]);
  };

  it.each([
    ['session', '["on","off"]'],
    ['db', '["off","on"]'],
  ])('changes the one that `property` names: %s', async (property, body) => {
    const app = await startApp(two(sessionOptions({ property, readOnly: true }), both));
    expect((await app.get('/')).body).toBe(body);
    await app.close();
  });

  it('asks which one is meant', async () => {
    const { error } = await errorOf(two(sessionOptions({ readOnly: true }), both));
    expect(error).toMatchObject({ code: 'ERR_SESSION_OPTIONS', message: expect.stringContaining("{ property: 'session' or 'db', ... }") });
  });

  it('names a property that has none', async () => {
    const { error } = await errorOf(two(sessionOptions({ property: 'other', readOnly: true }), both));
    expect(error).toMatchObject({ code: 'ERR_SESSION_MISSING' });
  });
});

describe('when there is no session', () => {
  it('says where to mount the middleware', async () => {
    const { error } = await errorOf((app) => {
      app.get('/', sessionOptions({ readOnly: true }), insert);
      app.use(sessionMiddleware(notes.knex));
    });
    expect(error).toMatchObject({ code: 'ERR_SESSION_MISSING', message: expect.stringContaining('before this route') });
  });
});

describe('when sessionOptions() is given something else', () => {
  it.each<[string, () => unknown, RegExp]>([
    ['nothing', () => sessionOptions(mistaken()), /It should be app\.get\(path, sessionOptions\(\{ \.\.\. \}\), handler\)\.$/],
    ['the request: mounted without a call', () => sessionOptions(mistaken(() => {})), /It should be app\.get/],
    ['null', () => sessionOptions(mistaken(null)), /^Expected options to be an object/],
    ['an unknown name', () => sessionOptions(mistaken({ readonly: true })), /^Unknown option `readonly`\. Did you mean `readOnly`\?$/],
    ['another unknown name', () => sessionOptions(mistaken({ level: 1 })), /sessionOptions\(\) takes: property, .*isolationLevel/],
    ['a level that is none', () => sessionOptions({ isolationLevel: mistaken('snapshot') }), /^Expected `isolationLevel` to be one of/],
    [
      'a word for true',
      () => sessionOptions({ transaction: mistaken('false') }),
      /^Expected `transaction` to be true or false, got 'false'/,
    ],
    ['settings that are none', () => sessionOptions({ settings: mistaken('a') }), /^Expected `settings` to be an object/],
    ['settings that are an array', () => sessionOptions({ settings: mistaken([]) }), /^Expected `settings` to be an object.*got Array/],
    ['a role without a name', () => sessionOptions({ role: '' }), /^Expected `role` to be the name of a role/],
  ])('is a TypeError at start-up: %s', (_case, make, message) => {
    expect(make).toThrow(TypeError);
    expect(make).toThrow(message);
  });
});
