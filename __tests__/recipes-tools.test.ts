import { randomBytes } from 'node:crypto';
import express from 'express';
import { sessionMiddleware } from 'express-knex-session';
import { Logger, run, runMigrations } from 'graphile-worker';
import type { Knex } from 'knex';
import { Model } from 'objection';
import { ExampleBench, runExample } from './support/example-bench';
import { deferred } from './support/gated-app';
import { get, post } from './support/http';
import { exampleIn } from './support/pages';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

/* Runs the examples of docs/recipes that are about other libraries, about the server, and about code that is there already. */
failOnWarnings();

const bench = ExampleBench.use(`
  CREATE TABLE entries (id serial, account text, amount int NOT NULL);
  CREATE TABLE users (id serial PRIMARY KEY, email text, welcomed boolean NOT NULL DEFAULT false);
  CREATE TABLE people (id serial PRIMARY KEY, name text NOT NULL);
  CREATE TABLE jobs (id serial PRIMARY KEY, kind text)`);
const stored = (table: string, ...columns: string[]) => bench.database.admin(table).select(columns).orderBy('id');
const transfer = { from: 'a', to: 'b', amount: 5 };

const quiet = new Logger(() => () => {});

describe('the recipe of jobs with graphile-worker', () => {
  it('has a job for each user that is stored, done once it is committed, and none for one that is not', async () => {
    await runMigrations({ connectionString: bench.database.adminUrl, logger: quiet });
    const jobs = async (): Promise<number> => (await bench.database.admin.raw('SELECT FROM graphile_worker.jobs')).rowCount;
    const app = bench.app();
    const url = await bench.serve(exampleIn('recipes/jobs', 'add_job'), { app });

    expect((await post(`${url}/signups`, { email: 'ann@example.com' })).status).toBe(201);
    await bench.database.admin.raw('ALTER TABLE users ADD CHECK (length(email) < 30)');
    expect((await post(`${url}/signups`, { email: `${'a'.repeat(30)}@example.com` })).status).toBe(500);
    expect(await jobs()).toBe(1);

    const mailed = deferred<unknown>();
    const sendMail = async (user: unknown) => mailed.resolve(user);
    const runner = await runExample(
      exampleIn('recipes/jobs', 'taskList'),
      {
        ...bench.scope(app),
        sendMail,
        process: { env: { DATABASE_URL: bench.database.adminUrl } },
        run: (options: object) => run({ ...options, logger: quiet, noHandleSignals: true }),
      },
      'runner',
    );
    expect(await mailed.promise).toMatchObject({ email: 'ann@example.com' });
    await eventually(async () => expect(await jobs()).toBe(0));
    await runner.stop();
    expect(await stored('users', 'email', 'welcomed')).toEqual([{ email: 'ann@example.com', welcomed: true }]);
  });
});

describe('the recipe of jobs of an app that runs under another role', () => {
  /** Roles belong to the server, which others use as well. */
  const role = `app_${randomBytes(6).toString('hex')}`;

  it("stores the job by the owner's function, and could not without", async () => {
    const { admin } = bench.database;
    await runMigrations({ connectionString: bench.database.adminUrl, logger: quiet });
    await admin.raw('CREATE ROLE ??; GRANT SELECT, INSERT ON users TO ??; GRANT USAGE ON users_id_seq TO ??', [role, role, role]);
    await admin.raw(exampleIn('recipes/jobs', 'SECURITY DEFINER', 'sql'));
    const code = exampleIn('recipes/jobs', 'add_job');
    const statusOf = async (code: string) => {
      const app = express().use(express.json(), sessionMiddleware(bench.knex, { role }));
      const answer = await post(`${await bench.serve(code, { app })}/signups`, { email: 'ann@example.com' });
      await bench.close();
      return [answer.status, answer.status === 500 ? answer.body : ''];
    };
    expect(await statusOf(code)).toEqual([500, '42501']);
    expect(await statusOf(code.replace('graphile_worker.add_job', 'add_job'))).toEqual([201, '']);
    const { rows } = await admin.raw('SELECT task_identifier FROM graphile_worker.jobs');
    expect(rows).toEqual([{ task_identifier: 'welcome' }]);
    await admin.raw('DROP OWNED BY ??; DROP ROLE ??', [role, role]);
  });
});

describe('the recipe of jobs in a table', () => {
  it('shares the jobs among workers, and keeps one that has failed', async () => {
    await bench.database.admin('jobs').insert([{ kind: 'first' }, { kind: 'second' }, { kind: 'bad' }]);
    const done: string[] = [];
    const both = deferred();
    const perform = async ({ kind }: { kind: string }) => {
      if (kind === 'bad') throw new RangeError('no');
      done.push(kind);
      if (done.length === 2) both.resolve();
      await both.promise;
    };
    const doNextJob = await runExample(exampleIn('recipes/jobs', 'skipLocked'), { ...bench.scope(express()), perform }, 'doNextJob');
    expect(await Promise.all([doNextJob(), doNextJob()])).toEqual([true, true]);
    expect(done.sort()).toEqual(['first', 'second']);
    await expect(doNextJob()).rejects.toThrow('no');
    expect(await stored('jobs', 'kind')).toEqual([{ kind: 'bad' }]);
    await bench.database.admin('jobs').del();
    expect(await doNextJob()).toBe(false);
  });
});

describe('the recipe of Objection', () => {
  it('has models in the session that they are handed', async () => {
    const own = `app.post('/fails', async (req) => { await Person.query(req.session).insert({ name: 'Bob' }); throw new Error('too late'); });`;
    const url = await bench.serve(exampleIn('recipes/objection', 'class Person') + own, { Model });
    expect(await post(`${url}/people`, { name: 'Ann' })).toMatchObject({ status: 201, body: '{"name":"Ann","id":1}' });
    expect(await get(`${url}/people/1`)).toMatchObject({ status: 200, body: '{"id":1,"name":"Ann"}' });
    expect((await post(`${url}/fails`)).body).toBe('too late');
    expect(await stored('people', 'name')).toEqual([{ name: 'Ann' }]);
  });

  it('has models that are bound to one db in the session of their request', async () => {
    class Bound extends Model {}
    const app = express().use(express.json());
    const routes = `
      class Person extends Model { static tableName = 'people'; }
      app.post('/people', async (req, res) => {
        await Person.query().insert({ name: req.body.name });
        res.sendStatus(req.body.name === 'Bob' ? 400 : 201);
      });`;
    const url = await bench.serve(exampleIn('recipes/objection', 'scopedSession') + routes, { app, Model: Bound });
    for (const name of ['Ann', 'Bob']) await post(`${url}/people`, { name });
    expect(await stored('people', 'name')).toEqual([{ name: 'Ann' }]);
  });
});

describe('the recipes of logging', () => {
  const logTo = (lines: object[]) => {
    const write = (line: object) => lines.push(line);
    return { debug: write, info: write, warn: write };
  };

  it('tell every statement with its transaction', async () => {
    const lines: Record<string, unknown>[] = [];
    const knex = bench.database.knex();
    await runExample(exampleIn('recipes/logging', 'query-error'), { knex, log: logTo(lines) });
    const app = express();
    const code = `
      app.use(sessionMiddleware(knex));
      app.get('/', async (req, res) => { await req.session('entries'); await req.session('nowhere'); });`;
    await get(await bench.serve(code, { app, knex }));
    expect(lines.map(({ sql, error }) => sql ?? error)).toEqual([
      'BEGIN;',
      'select * from "entries"',
      'select * from "nowhere"',
      expect.stringContaining('does not exist'),
      'ROLLBACK',
    ]);
    expect(new Set(lines.map(({ transaction }) => transaction)).size).toBe(1);
  });

  it('tell whose they are, and take no connection for it', async () => {
    const lines: object[] = [];
    const code = `${exampleIn('recipes/logging', 'originalUrl')}
      app.get('/none', (req, res) => res.end());
      app.get('/one', async (req, res) => { res.json(await req.session('entries')); });`;
    const url = await bench.serve(code, { log: logTo(lines) });
    const sql = await bench.sqlOf(() => get(`${url}/none`));
    expect(sql).toEqual([]);
    await get(`${url}/one`);
    await eventually(() =>
      expect(lines).toEqual([
        { url: '/none', status: 200, outcome: 'unused' },
        { url: '/one', sql: 'BEGIN;' },
        { url: '/one', sql: 'select * from "entries"' },
        { url: '/one', sql: 'COMMIT;' },
        { url: '/one', status: 200, outcome: 'committed' },
      ]),
    );
  });
});

describe('the recipe of logging on the server', () => {
  it('names the request while its transaction is open, and not after it', async () => {
    const app = express();
    app.use((req, _res, next) => {
      Object.assign(req, { id: 'request 7' });
      next();
    });
    const routes = `
      app.get('/', async (req, res) => {
        const { rows } = await req.session.raw('SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()');
        res.json(rows);
      });`;
    const url = await bench.serve(exampleIn('recipes/logging', 'application_name') + routes, { app });
    expect((await get(url)).body).toBe('[{"application_name":"request 7"}]');
    const { rows } = await bench.database.admin.raw("SELECT FROM pg_stat_activity WHERE application_name = 'request 7'");
    expect(rows).toEqual([]);
  });
});

describe('the recipes of timeouts on the server', () => {
  it('end a transaction that is left open, and store nothing of it', async () => {
    const code = exampleIn('recipes/server-timeouts', 'idle_in').replace('60_000', '100');
    const createKnex = ({ connection }: Knex.Config) => bench.database.knex({ connection: connection as Knex.PgConnectionConfig });
    const scope = { createKnex, process: { env: { DATABASE_URL: bench.database.url } } };
    const knex: Knex = await runExample(code, scope, 'knex');
    const app = express();
    const routes = `
      app.use(sessionMiddleware(knex));
      app.post('/', async (req, res) => {
        await req.session('entries').insert({ amount: 1 });
        await ended();
        await req.session('entries').insert({ amount: 2 });
        res.sendStatus(201);
      });`;
    const ended = () =>
      eventually(async () => {
        const { rows } = await bench.database.admin.raw(
          "SELECT FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'",
        );
        expect(rows).toEqual([]);
      });
    expect((await post(await bench.serve(routes, { app, knex, ended }))).status).toBe(500);
    expect(await stored('entries')).toEqual([]);
  });

  it('end a statement that takes too long, for one route', async () => {
    const code = exampleIn('recipes/server-timeouts', 'statement_timeout')
      .replace("'2s'", "'50ms'")
      .replace(/res\.json\(.*\);/, 'await req.session.raw("SELECT pg_sleep(30)");');
    const url = await bench.serve(code);
    expect(await get(`${url}/search?q=a`)).toMatchObject({ status: 500, body: '57014' });
  });
});

describe('the recipes of adoption', () => {
  it('have a session in one router, and none elsewhere', async () => {
    await bench.database.admin('entries').insert({ account: 'a', amount: 1 });
    const app = express();
    app.get('/outside', (req, res) => res.send(typeof req.session));
    const url = await bench.serve(exampleIn('recipes/adoption', 'Router'), { app });
    expect(JSON.parse((await get(`${url}/api/entries`)).body)).toHaveLength(1);
    expect((await get(`${url}/health`)).body).toBe('ok');
    expect((await get(`${url}/outside`)).body).toBe('undefined');
  });

  it('switch transactions on by a flag', async () => {
    let isSwitchedOn = false;
    const routes = `
      app.post('/', async (req, res) => { await req.session('entries').insert({ amount: 1 }); res.sendStatus(400); });`;
    const url = await bench.serve(exampleIn('recipes/adoption', 'isOn') + routes, { app: express(), isOn: () => isSwitchedOn });
    await post(url);
    expect(await stored('entries', 'amount')).toEqual([{ amount: 1 }]);
    isSwitchedOn = true;
    await post(url);
    expect(await stored('entries', 'amount')).toEqual([{ amount: 1 }]);
  });

  it('have functions that take a Knex join the session', async () => {
    const url = await bench.serve(exampleIn('recipes/adoption', 'db: Knex'));
    const sql = await bench.sqlOf(async () => expect((await post(`${url}/transfers`, transfer)).status).toBe(201));
    expect(sql.map((text) => text.split(' ')[0])).toEqual(['BEGIN;', 'SAVEPOINT', 'insert', 'insert', 'RELEASE', 'COMMIT;']);
  });
});

describe.each([
  ['by knex.transaction', 'recipes/from-knex-transaction', 'knex.transaction'],
  ['in a session', 'recipes/from-knex-transaction', 'req.session'],
  ['as in other frameworks', 'recipes/other-frameworks', 'req.session'],
])('the transfer that is written %s', (_way, page, text) => {
  it('stores both entries and sends a mail, or none', async () => {
    const mails: object[] = [];
    const url = await bench.serve(exampleIn(page, text), { sendMail: async (entry: object) => mails.push(entry) });
    expect(await post(`${url}/transfers`, transfer)).toMatchObject({ status: 201, body: expect.stringContaining('"id":2') });
    expect((await post(`${url}/transfers`, { ...transfer, amount: 2 ** 31 })).status).toBe(500);
    // Refused at COMMIT: the same once more.
    await bench.database.admin.raw('ALTER TABLE entries ADD CONSTRAINT once UNIQUE (account, amount) DEFERRABLE INITIALLY DEFERRED');
    expect((await post(`${url}/transfers`, transfer)).status).toBe(500);
    await bench.database.admin.raw('ALTER TABLE entries DROP CONSTRAINT once');
    expect(await stored('entries', 'account', 'amount')).toEqual([
      { account: 'a', amount: -5 },
      { account: 'b', amount: 5 },
    ]);
    expect(mails).toEqual([{ id: 2, account: 'b', amount: 5 }]);
  });
});
