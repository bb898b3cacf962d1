import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { pipeline } from 'node:stream/promises';
import { setTimeout as delay } from 'node:timers/promises';
import express from 'express';
import * as expressKnexSession from 'express-knex-session';
import { answerStatus, ExampleBench, runExample } from './support/example-bench';
import { deferred } from './support/gated-app';
import { get, post, RawClient, request } from './support/http';
import { exampleIn } from './support/pages';
import { failOnWarnings } from './support/warnings';

/* Runs the examples of docs/recipes that are about how a request, or the app, ends, and those of docs/errors.md. */
failOnWarnings();

const bench = ExampleBench.use(`
  CREATE TABLE entries (id serial, account text, amount int NOT NULL);
  CREATE TABLE users (id serial, name text, password_hash text);
  CREATE TABLE failed_logins (name text);
  CREATE TABLE tags (name text UNIQUE);
  CREATE TABLE uses (name text);
  CREATE TABLE transfers (id text PRIMARY KEY, amount int);
  CREATE TABLE vouchers (code text, used boolean);
  CREATE TABLE failed_vouchers (code text)`);

const hash = (text: string) => `#${text}`;

const entries = () => bench.database.admin('entries').select('account', 'amount').orderBy('id');

describe('the example of an error that is expected', () => {
  const use = async (code: string) => {
    const url = await bench.serve(code);
    const answers = [];
    for (let i = 0; i < 2; i++) answers.push(await request(`${url}/tags/new`, { method: 'PUT' }));
    return { answers: answers.map(({ status, body }) => [status, body]), uses: await bench.database.admin('uses').pluck('name') };
  };

  it('lets the request go on', async () => {
    const went = await use(exampleIn('errors', 'savepoint'));
    expect(went).toEqual({ answers: Array(2).fill([204, '']), uses: ['new', 'new'] });
  });

  it('would fail without the savepoint, as it says', async () => {
    const went = await use(
      exampleIn('errors', 'savepoint')
        .replace('req.session.transaction((savepoint) => savepoint', '((savepoint) => savepoint')
        .replace('insert(tag))', 'insert(tag))(req.session)'),
    );
    expect(went).toEqual({
      answers: [
        [204, ''],
        [500, '25P02'],
      ],
      uses: ['new'],
    });
  });
});

describe('the example of a request that can be repeated', () => {
  it('stores it once', async () => {
    const url = await bench.serve(exampleIn('errors', 'onConflict'));
    const put = () => request(`${url}/transfers/a1`, { method: 'PUT', body: { amount: 5 } });
    expect([(await put()).status, (await put()).status]).toEqual([201, 200]);
    expect(await bench.database.admin('transfers')).toEqual([{ id: 'a1', amount: 5 }]);
  });
});

// Hazard 43.
describe('the recipe of a 4xx that must persist', () => {
  it('keeps the failed login, with the 401', async () => {
    await bench.database.admin('users').insert({ name: 'ann', password_hash: '#right' });
    const url = await bench.serve(exampleIn('recipes/4xx-that-persist', 'hash'), { hash });
    expect(await post(`${url}/login`, { name: 'ann', password: 'wrong' })).toMatchObject({ status: 401 });
    expect(await bench.database.admin('failed_logins')).toEqual([{ name: 'ann' }]);
    expect(await post(`${url}/login`, { name: 'ann', password: 'right' })).toMatchObject({ status: 200, body: '{"id":1}' });
  });

  it('would lose it without the line that it points at', async () => {
    const code = exampleIn('recipes/4xx-that-persist', 'hash').replace(/^.*session\.commit\(\).*$/m, '');
    const url = await bench.serve(code, { hash });
    expect(await post(`${url}/login`, { name: 'ann', password: 'wrong' })).toMatchObject({ status: 401 });
    expect(await bench.database.admin('failed_logins')).toEqual([]);
  });
});

describe('the recipe of what is written when all else is rolled back', () => {
  it('keeps what the hook has stored, with the 404', async () => {
    await bench.database.admin('vouchers').insert({ code: 'a', used: false });
    const url = await bench.serve(exampleIn('recipes/4xx-that-persist', 'afterRollback'));
    expect([(await post(`${url}/vouchers/a`)).status, (await post(`${url}/vouchers/a`)).status]).toEqual([204, 404]);
    expect(await bench.database.admin('failed_vouchers')).toEqual([{ code: 'a' }]);
  });
});

describe('the recipe of a stream', () => {
  it('sends all rows, and a cut one if it fails half-way', async () => {
    await bench.database.admin.raw("INSERT INTO entries (account, amount) SELECT 'a', n FROM generate_series(1, 5000) n");
    const url = await bench.serve(exampleIn('recipes/streaming-exports', 'csv'), { pipeline });
    const { body, complete, headers } = await get(`${url}/entries.csv`);
    expect({ complete, lines: body.split('\n').length, type: headers['content-type'] }).toEqual({
      complete: true,
      lines: 5001,
      type: 'text/csv; charset=utf-8',
    });
  });
});

describe('the recipe of an export page by page', () => {
  it('sends all pages, of one moment, and holds one connection', async () => {
    await bench.database.admin.raw("INSERT INTO entries (account, amount) SELECT 'a', n FROM generate_series(1, 2500) n");
    const url = await bench.serve(exampleIn('recipes/streaming-exports', 'ndjson'), { pipeline });
    const statements = await bench.sqlOf(async () => {
      const { body, complete } = await get(`${url}/entries.ndjson`);
      const lines = body.trimEnd().split('\n');
      expect({ complete, lines: lines.length, last: JSON.parse(lines.at(-1) ?? '').amount }).toEqual({
        complete: true,
        lines: 2500,
        last: 2500,
      });
    });
    expect(statements.map((sql) => sql.split(' ')[0])).toEqual(['BEGIN', 'select', 'select', 'select', 'select', 'COMMIT;']);
    expect(statements[0]).toBe('BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY;');
  });

  it('cuts the response if a page fails', async () => {
    await bench.database.admin.raw("INSERT INTO entries (account, amount) SELECT 'a', n FROM generate_series(1, 2500) n");
    const code = exampleIn('recipes/streaming-exports', 'ndjson').replace('last = page.at(-1).id', "last = 'none' as never");
    const url = await bench.serve(code, { pipeline });
    expect(await get(`${url}/entries.ndjson`)).toMatchObject({ status: 200, complete: false });
  });
});

describe('the recipe of a client that leaves', () => {
  it('stops the outside call of the handler', async () => {
    const fetching = deferred<AbortSignal>();
    const fetch = (_url: string, { signal }: { signal: AbortSignal }) => {
      fetching.resolve(signal);
      return once(signal, 'abort').then(() => Promise.reject(signal.reason));
    };
    const app = bench.app();
    await runExample(exampleIn('recipes/clients-that-leave'), { ...bench.scope(app), fetch }, 'app');
    const { port } = new URL(await bench.listen(app));
    const client = (await RawClient.connect(Number(port))).get('/report');
    const signal = await fetching.promise;
    await client.reset();
    await once(signal, 'abort');
    expect(signal.reason).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
  });
});

describe('the recipe of a shutdown', () => {
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
    await runExample(exampleIn('recipes/shutdown'), scope, 'app');
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
