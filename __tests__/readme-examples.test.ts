import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { pipeline } from 'node:stream/promises';
import { setTimeout as delay } from 'node:timers/promises';
import express, { type ErrorRequestHandler, type Express } from 'express';
import * as expressKnexSession from 'express-knex-session';
import type { Knex } from 'knex';
import { createDatabase, type TestDatabase } from './support/database';
import { expressSession } from './support/express-session';
import { deferred } from './support/gated-app';
import { get, type Listening, listen, post, RawClient } from './support/http';
import { poolUsage } from './support/pool';
import { exampleOf, runExample } from './support/readme';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

let database: TestDatabase;
let knex: Knex;
let server: Listening | undefined;

beforeAll(async () => {
  database = await createDatabase();
  knex = database.knex();
  await database.admin.raw(`
    CREATE TABLE entries (id serial, account text, amount int NOT NULL, day int);
    CREATE TABLE days (id serial, closed_at timestamptz);
    CREATE TABLE visits (id serial, page text);
    CREATE TABLE users (id serial, name text, password_hash text);
    CREATE TABLE failed_logins (name text)`);
});

afterEach(async () => {
  await server?.close();
  server = undefined;
  expect(poolUsage(knex).used).toBe(0);
  await database.admin.raw('TRUNCATE entries, days, visits, users, failed_logins RESTART IDENTITY');
});
afterAll(() => database.drop());

const answerStatus: ErrorRequestHandler = (error, _req, res, _next) => {
  res.status(error.status ?? 500).send(error.code ?? error.message);
};

/** An app with the middleware, for examples that show a part of one. */
function appWithSessions(): Express {
  return express().use(express.json(), expressKnexSession.sessionMiddleware(knex));
}

function scopeWith(app: Express): Record<string, unknown> {
  return {
    ...expressKnexSession,
    express,
    createKnex: () => knex,
    knex,
    app,
    expressSession,
    pipeline,
    hash: (text: string) => `#${text}`,
  };
}

/** Runs an example on an app, makes the app listen, and gives its address. */
async function serve(code: string, app = appWithSessions()): Promise<string> {
  const shown: Express = await runExample(code, scopeWith(app), 'app');
  // Each example ends where the reader's own error handler may follow.
  shown.use(expressKnexSession.sessionErrorHandler(), answerStatus);
  server = await listen(shown);
  return server.url;
}

const entries = () => database.admin('entries').select('account', 'amount').orderBy('id');

describe('the first example', () => {
  it('stores both entries, or none', async () => {
    const url = await serve(exampleOf('express-knex-session'));
    expect(await post(`${url}/transfers`, { from: 'a', to: 'b', amount: 5 })).toMatchObject({ status: 201 });
    const both = [
      { account: 'a', amount: -5 },
      { account: 'b', amount: 5 },
    ];
    expect(await entries()).toEqual(both);
    // -(2^31 - 1) is an integer, and 2^31 is none.
    expect(await post(`${url}/transfers`, { from: 'a', to: 'b', amount: 2 ** 31 })).toMatchObject({ status: 500 });
    expect(await entries()).toEqual(both);
  });
});

describe('the example of setRollbackOnly', () => {
  it('shows the rows, and stores them unless it is a dry run', async () => {
    const url = await serve(exampleOf('What happens at the end of a request'));
    const [entry] = JSON.parse((await post(`${url}/import?dryRun=1`, { account: 'a', amount: 1 })).body);
    expect(entry).toMatchObject({ id: 1, account: 'a', amount: 1 });
    expect(await entries()).toEqual([]);
    await post(`${url}/import`, { account: 'a', amount: 2 });
    expect(await entries()).toEqual([{ account: 'a', amount: 2 }]);
  });
});

describe('the example of options', () => {
  it('is accepted, and commits a 422', async () => {
    const app = express();
    const url = await serve(
      `${exampleOf('Options')}
      app.post('/', async (req, res) => {
        await req.session('entries').insert({ account: 'a', amount: 1 });
        res.status(422).end();
      });`,
      app,
    );
    expect((await post(url)).status).toBe(422);
    expect(await entries()).toHaveLength(1);
  });
});

describe('the example with express-session', () => {
  it('has both sessions', async () => {
    const url = await serve(exampleOf('With express-session'), express().use(express.json()));
    expect(await post(`${url}/visits`, { page: '/' })).toMatchObject({ status: 201, body: '{"id":1}' });
    expect(await database.admin('visits')).toEqual([{ id: 1, page: '/' }]);
  });

  it('saves the login after COMMIT, as the README says', async () => {
    const order: string[] = [];
    const store = new (expressSession as any).MemoryStore();
    const { set } = store;
    store.set = (...values: unknown[]) => {
      order.push('login saved');
      return set.apply(store, values);
    };
    const listener = ({ sql }: { sql: string }) => order.push(sql);
    knex.on('query', listener);
    const session = (options: object) => expressSession({ ...options, store });
    const app = express().use(express.json());
    await runExample(exampleOf('With express-session'), { ...scopeWith(app), expressSession: session });
    app.post('/login', async (req, res) => {
      await expressKnexSession.getSession(req, 'db').raw('SELECT 1');
      (req as unknown as { session: { userId: number } }).session.userId = 1;
      res.end();
    });
    server = await listen(app);
    await post(`${server.url}/login`);
    knex.removeListener('query', listener);
    expect(order).toEqual(['BEGIN;', 'SELECT 1', 'COMMIT;', 'login saved']);
  });
});

describe('the example of one router', () => {
  it('has a session there, and none elsewhere', async () => {
    await database.admin('entries').insert({ account: 'a', amount: 1 });
    const app = express();
    app.get('/outside', (req, res) => res.send(typeof req.session));
    const url = await serve(exampleOf('One router only'), app);
    expect(JSON.parse((await get(`${url}/api/entries`)).body)).toHaveLength(1);
    expect((await get(`${url}/health`)).body).toBe('ok');
    expect((await get(`${url}/outside`)).body).toBe('undefined');
  });
});

describe('the example of an error handler', () => {
  it('answers by code, and leaves other errors alone', async () => {
    const app = appWithSessions();
    app.get('/swallowed', async (req, res) => {
      await req.session.raw('SELECT 1/0').catch(() => {});
      res.send('fine');
    });
    app.get('/unknown', async (req, res) => {
      await req.session.raw('SELECT 1');
      const { rows } = await req.session.raw('SELECT pg_backend_pid() AS pid');
      await req.session.raw(
        `CREATE TEMPORARY TABLE doomed (pid int);
         CREATE FUNCTION pg_temp.die() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_terminate_backend(NEW.pid); RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER dies AFTER INSERT ON doomed DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pg_temp.die();`,
      );
      await req.session('doomed').insert(rows[0]);
      res.send('fine');
    });
    app.get('/other', () => {
      throw new Error('other');
    });
    const url = await serve(exampleOf('Errors by code'), app);
    expect(await get(`${url}/swallowed`)).toMatchObject({ status: 500, body: '{"error":"ERR_TRANSACTION_ABORTED"}' });
    expect(await get(`${url}/unknown`)).toMatchObject({ status: 500, body: '{"error":"It is not known whether this was stored."}' });
    expect(await get(`${url}/other`)).toMatchObject({ status: 500, body: 'other' });
  });
});

describe('the example of withSession', () => {
  it('closes the day, and tells after COMMIT', async () => {
    await database.admin('entries').insert({ account: 'a', amount: 1 });
    const console = { log: jest.fn() };
    await runExample(exampleOf('Why a session per request'), { ...scopeWith(express()), console });
    expect(console.log).toHaveBeenCalledWith(1);
    expect(await database.admin('entries').pluck('day')).toEqual([1]);
  });
});

// Hazard 43.
describe('the example of a 4xx that must persist', () => {
  it('keeps the failed login, with the 401', async () => {
    await database.admin('users').insert({ name: 'ann', password_hash: '#right' });
    const url = await serve(exampleOf('4xx that must persist'));
    expect(await post(`${url}/login`, { name: 'ann', password: 'wrong' })).toMatchObject({ status: 401 });
    expect(await database.admin('failed_logins')).toEqual([{ name: 'ann' }]);
    expect(await post(`${url}/login`, { name: 'ann', password: 'right' })).toMatchObject({ status: 200, body: '{"id":1}' });
  });

  it('would lose it without the line that it points at', async () => {
    const code = exampleOf('4xx that must persist').replace(/^.*session\.commit\(\).*$/m, '');
    const url = await serve(code);
    expect(await post(`${url}/login`, { name: 'ann', password: 'wrong' })).toMatchObject({ status: 401 });
    expect(await database.admin('failed_logins')).toEqual([]);
  });
});

describe('the example of a stream', () => {
  it('sends all rows, and a cut one if it fails half-way', async () => {
    await database.admin.raw("INSERT INTO entries (account, amount) SELECT 'a', n FROM generate_series(1, 5000) n");
    const url = await serve(exampleOf('Limits', 'pipeline'));
    const { body, complete, headers } = await get(`${url}/entries.csv`);
    expect({ complete, lines: body.split('\n').length, type: headers['content-type'] }).toEqual({
      complete: true,
      lines: 5001,
      type: 'text/csv; charset=utf-8',
    });
  });
});

describe('what the limits say', () => {
  it('takes an isolation level as the first statement', async () => {
    const level = await expressKnexSession.withSession(knex, async (session) => {
      await session.raw('SET TRANSACTION ISOLATION LEVEL SERIALIZABLE');
      const { rows } = await session.raw('SHOW transaction_isolation');
      return rows[0].transaction_isolation;
    });
    expect(level).toBe('serializable');
  });
});

describe('the example of a client that leaves', () => {
  it('stops the outside call of the handler', async () => {
    const fetching = deferred<AbortSignal>();
    const fetch = (_url: string, { signal }: { signal: AbortSignal }) => {
      fetching.resolve(signal);
      return once(signal, 'abort').then(() => Promise.reject(signal.reason));
    };
    const app = appWithSessions();
    await runExample(exampleOf('When the client leaves, and when things hang'), { ...scopeWith(app), fetch }, 'app');
    server = await listen(app);
    const client = (await RawClient.connect(server.port)).get('/report');
    const signal = await fetching.promise;
    await client.reset();
    await once(signal, 'abort');
    expect(signal.reason).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
  });
});

describe('the example of a shutdown', () => {
  it('lets an open session finish, refuses a new one, and then destroys the pool', async () => {
    const app = express();
    const stop = deferred<() => Promise<void>>();
    const own = database.knex();
    const listening = createServer(app).listen(0, '127.0.0.1');
    await once(listening, 'listening');
    const scope = {
      ...scopeWith(app),
      knex: own,
      app: Object.assign(app, { listen: () => listening }),
      once,
      delay,
      process: { once: (_signal: string, listener: () => Promise<void>) => stop.resolve(listener) },
    };
    await runExample(exampleOf('Shutdown'), scope, 'app');
    const held = deferred<void>();
    const opened = deferred<void>();
    app.post('/slow', async (req, res) => {
      await req.session('entries').insert({ account: 'slow', amount: 1 });
      opened.resolve();
      await held.promise;
      res.sendStatus(201);
    });
    const arrived = deferred();
    const draining = deferred();
    app.post('/new', async (req, res) => {
      arrived.resolve();
      await draining.promise;
      await req.session('entries').insert({ account: 'new', amount: 1 });
      res.sendStatus(201);
    });
    app.use(expressKnexSession.sessionErrorHandler(), answerStatus);
    const url = `http://127.0.0.1:${(listening.address() as AddressInfo).port}`;

    const slow = post(`${url}/slow`);
    const late = post(`${url}/new`);
    await Promise.all([opened.promise, arrived.promise]);
    const stopped = (await stop.promise)();
    draining.resolve();
    expect(await late).toMatchObject({ status: 503, body: 'ERR_SESSION_UNAVAILABLE' });
    held.resolve();
    expect(await slow).toMatchObject({ status: 201 });
    await stopped;
    expect(await entries()).toEqual([{ account: 'slow', amount: 1 }]);
    expect(own.client.pool).toBeUndefined();
  });
});
