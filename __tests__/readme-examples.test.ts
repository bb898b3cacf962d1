import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { pipeline } from 'node:stream/promises';
import { setTimeout as delay } from 'node:timers/promises';
import express from 'express';
import * as expressKnexSession from 'express-knex-session';
import { expressSession } from './support/express-session';
import { deferred } from './support/gated-app';
import { get, post, RawClient } from './support/http';
import { answerStatus, ExampleBench, exampleOf, runExample } from './support/readme';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

const bench = ExampleBench.use(`
  CREATE TABLE entries (id serial, account text, amount int NOT NULL, day int);
  CREATE TABLE days (id serial, closed_at timestamptz);
  CREATE TABLE visits (id serial, page text);
  CREATE TABLE users (id serial, name text, password_hash text);
  CREATE TABLE failed_logins (name text);
  CREATE TABLE vouchers (code text, used boolean);
  CREATE TABLE failed_vouchers (code text)`);

const hash = (text: string) => `#${text}`;

const entries = () => bench.database.admin('entries').select('account', 'amount').orderBy('id');

describe('the first example', () => {
  it('stores both entries, or none', async () => {
    const url = await bench.serve(exampleOf('express-knex-session'));
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
    const url = await bench.serve(exampleOf('What happens at the end of a request'));
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
    const url = await bench.serve(
      `${exampleOf('Options')}
      app.post('/', async (req, res) => {
        await req.session('entries').insert({ account: 'a', amount: 1 });
        res.status(422).end();
      });`,
      { app },
    );
    expect((await post(url)).status).toBe(422);
    expect(await entries()).toHaveLength(1);
  });
});

describe('the example with express-session', () => {
  it('has both sessions', async () => {
    const url = await bench.serve(exampleOf('With express-session'), { app: express().use(express.json()), expressSession });
    expect(await post(`${url}/visits`, { page: '/' })).toMatchObject({ status: 201, body: '{"id":1}' });
    expect(await bench.database.admin('visits')).toEqual([{ id: 1, page: '/' }]);
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
    bench.knex.on('query', listener);
    const session = (options: object) => expressSession({ ...options, store });
    const app = express().use(express.json());
    await runExample(exampleOf('With express-session'), { ...bench.scope(app), expressSession: session });
    app.post('/login', async (req, res) => {
      await expressKnexSession.getSession(req, 'db').raw('SELECT 1');
      (req as unknown as { session: { userId: number } }).session.userId = 1;
      res.end();
    });
    await post(`${await bench.listen(app)}/login`);
    bench.knex.removeListener('query', listener);
    expect(order).toEqual(['BEGIN;', 'SELECT 1', 'COMMIT;', 'login saved']);
  });
});

describe('the example of one router', () => {
  it('has a session there, and none elsewhere', async () => {
    await bench.database.admin('entries').insert({ account: 'a', amount: 1 });
    const app = express();
    app.get('/outside', (req, res) => res.send(typeof req.session));
    const url = await bench.serve(exampleOf('One router only'), { app });
    expect(JSON.parse((await get(`${url}/api/entries`)).body)).toHaveLength(1);
    expect((await get(`${url}/health`)).body).toBe('ok');
    expect((await get(`${url}/outside`)).body).toBe('undefined');
  });
});

describe('the example of an error handler', () => {
  it('answers by code, and leaves other errors alone', async () => {
    const app = bench.app();
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
    app.get('/conflict', () => {
      throw Object.assign(new Error('could not serialize access'), { code: '40001' });
    });
    app.get('/other', () => {
      throw new Error('other');
    });
    const url = await bench.serve(exampleOf('Errors by code'), { app });
    expect(await get(`${url}/swallowed`)).toMatchObject({ status: 500, body: '{"error":"ERR_TRANSACTION_ABORTED"}' });
    expect(await get(`${url}/unknown`)).toMatchObject({ status: 500, body: '{"error":"It is not known whether this was stored."}' });
    expect(await get(`${url}/conflict`)).toMatchObject({ status: 503, headers: { 'retry-after': '1' } });
    expect(await get(`${url}/other`)).toMatchObject({ status: 500, body: 'other' });
  });
});

describe('the example of withSession', () => {
  it('closes the day, and tells after COMMIT', async () => {
    await bench.database.admin('entries').insert({ account: 'a', amount: 1 });
    const console = { log: jest.fn() };
    await runExample(exampleOf('Why a session per request'), { ...bench.scope(express()), console });
    expect(console.log).toHaveBeenCalledWith(1);
    expect(await bench.database.admin('entries').pluck('day')).toEqual([1]);
  });
});

// Hazard 43.
describe('the example of a 4xx that must persist', () => {
  it('keeps the failed login, with the 401', async () => {
    await bench.database.admin('users').insert({ name: 'ann', password_hash: '#right' });
    const url = await bench.serve(exampleOf('4xx that must persist', 'hash'), { hash });
    expect(await post(`${url}/login`, { name: 'ann', password: 'wrong' })).toMatchObject({ status: 401 });
    expect(await bench.database.admin('failed_logins')).toEqual([{ name: 'ann' }]);
    expect(await post(`${url}/login`, { name: 'ann', password: 'right' })).toMatchObject({ status: 200, body: '{"id":1}' });
  });

  it('would lose it without the line that it points at', async () => {
    const code = exampleOf('4xx that must persist', 'hash').replace(/^.*session\.commit\(\).*$/m, '');
    const url = await bench.serve(code, { hash });
    expect(await post(`${url}/login`, { name: 'ann', password: 'wrong' })).toMatchObject({ status: 401 });
    expect(await bench.database.admin('failed_logins')).toEqual([]);
  });
});

describe('the example of what is written when all else is rolled back', () => {
  it('keeps what the hook has stored, with the 404', async () => {
    await bench.database.admin('vouchers').insert({ code: 'a', used: false });
    const url = await bench.serve(exampleOf('4xx that must persist', 'afterRollback'));
    expect([(await post(`${url}/vouchers/a`)).status, (await post(`${url}/vouchers/a`)).status]).toEqual([204, 404]);
    expect(await bench.database.admin('failed_vouchers')).toEqual([{ code: 'a' }]);
  });
});

describe('the example of a stream', () => {
  it('sends all rows, and a cut one if it fails half-way', async () => {
    await bench.database.admin.raw("INSERT INTO entries (account, amount) SELECT 'a', n FROM generate_series(1, 5000) n");
    const url = await bench.serve(exampleOf('Limits', 'pipeline'), { pipeline });
    const { body, complete, headers } = await get(`${url}/entries.csv`);
    expect({ complete, lines: body.split('\n').length, type: headers['content-type'] }).toEqual({
      complete: true,
      lines: 5001,
      type: 'text/csv; charset=utf-8',
    });
  });
});

describe('the example of a client that leaves', () => {
  it('stops the outside call of the handler', async () => {
    const fetching = deferred<AbortSignal>();
    const fetch = (_url: string, { signal }: { signal: AbortSignal }) => {
      fetching.resolve(signal);
      return once(signal, 'abort').then(() => Promise.reject(signal.reason));
    };
    const app = bench.app();
    await runExample(exampleOf('When the client leaves, and when things hang'), { ...bench.scope(app), fetch }, 'app');
    const { port } = new URL(await bench.listen(app));
    const client = (await RawClient.connect(Number(port))).get('/report');
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
    const own = bench.database.knex();
    const listening = createServer(app).listen(0, '127.0.0.1');
    await once(listening, 'listening');
    const scope = {
      ...bench.scope(app),
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
