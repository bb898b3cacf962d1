import express from 'express';
import * as expressKnexSession from 'express-knex-session';
import { ExampleBench, runExample } from './support/example-bench';
import { expressSession } from './support/express-session';
import { get, post } from './support/http';
import { exampleOf } from './support/pages';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

const bench = ExampleBench.use(`
  CREATE TABLE entries (id serial, account text, amount int NOT NULL, day int);
  CREATE TABLE days (id serial, closed_at timestamptz);
  CREATE TABLE visits (id serial, page text)`);

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
