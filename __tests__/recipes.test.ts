import { randomBytes } from 'node:crypto';
import express, { type Request } from 'express';
import { ExampleBench, runExample } from './support/example-bench';
import { get, post } from './support/http';
import { exampleIn } from './support/pages';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

/* Runs the examples of docs/recipes that are about options and sessions, and that of docs/scaling.md. */
failOnWarnings();

const bench = ExampleBench.use(`
  CREATE TABLE entries (id serial, account text, amount int NOT NULL, day int);
  CREATE TABLE invoices (id serial, tenant int);
  CREATE TABLE orders (id serial PRIMARY KEY, item text NOT NULL, state text, receipt text);
  CREATE TABLE audit (url text)`);
const stored = (table: string) => bench.database.admin(table).orderBy('id');

describe('the recipe of row-level security', () => {
  /** Roles belong to the server, which others use as well. */
  const role = `app_${randomBytes(6).toString('hex')}`;
  const withRole = (text: string) => text.replaceAll('app_user', role);
  const recipe = withRole(exampleIn('recipes/row-level-security'));

  beforeAll(async () => {
    await bench.database.admin.raw(withRole(exampleIn('recipes/row-level-security', '', 'sql')));
  });
  afterAll(() => bench.database.admin.raw('DROP OWNED BY ??; DROP ROLE ??', [role, role]));
  beforeEach(() => bench.database.admin('invoices').insert([{ tenant: 1 }, { tenant: 2 }]));

  function serve(): Promise<string> {
    const app = express();
    const tenantOf = (req: Request) => req.get('x-tenant') && Number(req.get('x-tenant'));
    const own = `app.post('/invoices', async (req, res) => { await req.session('invoices').insert({ tenant: 2 }); res.end(); });`;
    return bench.serve(recipe + own, { app, tenantOf });
  }

  it('shows each tenant its own rows, and lets it store no other', async () => {
    const url = await serve();
    for (const tenant of [1, 2, 1]) {
      const { body } = await get(`${url}/invoices`, { headers: { 'x-tenant': String(tenant) } });
      expect(JSON.parse(body)).toEqual([{ id: tenant, tenant }]);
    }
    expect(await post(`${url}/invoices`, undefined, { headers: { 'x-tenant': '1' } })).toMatchObject({ status: 500, body: '42501' });
  });

  it('runs nothing without a tenant', async () => {
    const url = await serve();
    const sql = await bench.sqlOf(async () =>
      expect(await get(`${url}/invoices`)).toMatchObject({ status: 500, body: 'ERR_SESSION_OPTIONS' }),
    );
    expect(sql).toEqual([]);
  });

  it("finds NULL first, and '' on a connection where a transaction has set it: neither matches a row", async () => {
    const pool = bench.database.knex({ pool: { min: 1, max: 1 } });
    const seen = (): Promise<unknown> =>
      pool.transaction(async (trx) => {
        await trx.raw('SET LOCAL ROLE ??', [role]);
        const { rows } = await trx.raw(
          "SELECT current_setting('app.tenant', true) AS tenant, (SELECT count(*)::int FROM invoices) AS rows",
        );
        return rows[0];
      });
    expect(await seen()).toEqual({ tenant: null, rows: 0 });
    await pool.transaction((trx) => trx.raw("SELECT set_config('app.tenant', '1', true)"));
    expect(await seen()).toEqual({ tenant: '', rows: 0 });
  });
});

describe("the recipe of one route's isolation level", () => {
  it('reads in one snapshot, and could not write', async () => {
    await bench.database.admin('entries').insert([
      { account: 'a', amount: 1 },
      { account: 'a', amount: 2 },
    ]);
    const url = await bench.serve(exampleIn('recipes/isolation'));
    const [begin] = await bench.sqlOf(async () =>
      expect(JSON.parse((await get(`${url}/statement?account=a`)).body)).toMatchObject({
        entries: [{ amount: 1 }, { amount: 2 }],
        balance: '3',
      }),
    );
    expect(begin).toBe('BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY;');
  });
});

describe('the recipe of a replica', () => {
  it('reads there, and cannot write there', async () => {
    const replica = bench.database.knex();
    const app = express();
    const routes = `
      app.get('/entries', async (req, res) => { res.json(await req.session('entries')); });
      app.get('/write', async (req, res) => { await req.session('entries').insert({ amount: 1 }); res.end(); });
      app.post('/entries', async (req, res) => { await req.session('entries').insert({ amount: 1 }); res.sendStatus(201); });`;
    const url = await bench.serve(exampleIn('recipes/replicas') + routes, { app, createKnex: () => replica });
    const onPrimary = await bench.sqlOf(async () => {
      const onReplica = await bench.sqlOf(async () => {
        await get(`${url}/entries`);
        expect(await get(`${url}/write`)).toMatchObject({ status: 500, body: '25006' });
        expect((await post(`${url}/entries`)).status).toBe(201);
      }, replica);
      expect(onReplica.filter((sql) => sql.startsWith('BEGIN'))).toEqual(Array(2).fill('BEGIN TRANSACTION READ ONLY;'));
    });
    expect(onPrimary).toEqual(['BEGIN TRANSACTION READ WRITE;', expect.stringContaining('insert'), 'COMMIT;']);
  });
});

describe('the recipe of cheap reads', () => {
  it('reads only, or without a transaction', async () => {
    await bench.database.admin('entries').insert({ account: 'a', amount: 1 });
    const url = await bench.serve(exampleIn('recipes/cheap-reads'));
    const [begin] = await bench.sqlOf(async () => expect((await get(`${url}/accounts`)).body).toBe('[{"account":"a"}]'));
    expect(begin).toBe('BEGIN TRANSACTION READ ONLY;');
    const sql = await bench.sqlOf(async () => expect(JSON.parse((await get(`${url}/accounts/a`)).body)).toHaveLength(1));
    expect(sql).toEqual([expect.stringContaining('select')]);
  });
});

describe('the recipe of hooks', () => {
  it('sends the mail of an order that is stored, with its audit row, and of no other', async () => {
    const sent: unknown[] = [];
    const sendMail = async (order: { id: number }) => sent.push([order.id, await bench.database.admin('orders').pluck('id')]);
    const url = await bench.serve(exampleIn('recipes/after-commit'), { sendMail });
    expect((await post(`${url}/orders`, { item: 'a pen' })).status).toBe(201);
    await bench.database.admin.raw('ALTER TABLE audit ADD CONSTRAINT once UNIQUE (url)');
    expect((await post(`${url}/orders`, { item: 'a pencil' })).status).toBe(500);
    await bench.database.admin.raw('ALTER TABLE audit DROP CONSTRAINT once');
    expect(sent).toEqual([[1, [1]]]);
    expect(await stored('orders')).toMatchObject([{ id: 1, item: 'a pen' }]);
    expect(await bench.database.admin('audit')).toEqual([{ url: '/orders' }]);
  });
});

describe('the recipe of a slow call outside', () => {
  it('holds no connection meanwhile, and what came before is stored', async () => {
    await bench.database.admin('orders').insert({ item: 'a pen' });
    const calling = deferred();
    const charged = deferred<string>();
    const charge = (_id: string, { signal }: { signal: AbortSignal }) => {
      expect(signal.aborted).toBe(false);
      calling.resolve();
      return charged.promise;
    };
    const url = await bench.serve(exampleIn('recipes/slow-calls'), { charge });
    const answer = post(`${url}/orders/1/payment`);
    await calling.promise;
    expect(poolUsage(bench.knex).used).toBe(0);
    expect(await stored('orders')).toMatchObject([{ state: 'paying', receipt: null }]);
    charged.resolve('no. 7');
    expect((await answer).status).toBe(204);
    expect(await stored('orders')).toMatchObject([{ state: 'paid', receipt: 'no. 7' }]);
  });
});

describe('the recipe of trying again', () => {
  it('lets one of two withdrawals through that are not covered together, and the other one see it', async () => {
    await bench.database.admin('entries').insert({ account: 'a', amount: 100 });
    const url = await bench.serve(exampleIn('recipes/retries'));
    const answers = await whileWritesWait(2, async () => [60, 60].map((amount) => post(`${url}/withdrawals`, { account: 'a', amount })));
    expect(answers.map(({ status }) => status).sort()).toEqual([201, 409]);
    expect(await bench.database.admin('entries').pluck('amount')).toEqual([100, -60]);
  });

  it('would refuse the other one without it', async () => {
    await bench.database.admin('entries').insert({ account: 'a', amount: 100 });
    const retryable = (handler: unknown) => handler;
    const url = await bench.serve(exampleIn('recipes/retries'), { retryable });
    const answers = await whileWritesWait(2, async () => [60, 60].map((amount) => post(`${url}/withdrawals`, { account: 'a', amount })));
    expect(answers.map(({ status, body }) => [status, body]).sort()).toEqual([
      [201, ''],
      [500, '40001'],
    ]);
  });

  /** So that all have read before the first one writes. */
  async function whileWritesWait<T>(count: number, send: () => Promise<Promise<T>[]>): Promise<T[]> {
    const lock = await bench.database.admin.transaction();
    await lock.raw('LOCK TABLE entries IN SHARE MODE');
    const answers = await send();
    await eventually(async () => {
      const { rows } = await bench.database.admin.raw(
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
      );
      expect(rows).toHaveLength(count);
    });
    await lock.commit();
    return Promise.all(answers);
  }
});

describe('the recipe of access from anywhere', () => {
  it('has a service that is handed nothing work in the request, and stores nothing of one that fails', async () => {
    const console = { log: jest.fn() };
    const app = express().use(express.json());
    const failing = `
      app.post('/fails', async (req, res) => { await deposit('b', 1); throw new Error('too late'); });
      app.use(sessionErrorHandler());`;
    const url = await bench.serve(exampleIn('recipes/access-from-anywhere') + failing, { app, console });
    expect((await post(`${url}/deposits`, { account: 'a', amount: 1 })).status).toBe(201);
    expect((await post(`${url}/fails`)).body).toBe('too late');
    expect(await stored('entries')).toMatchObject([{ account: 'a', amount: 1 }]);
    expect(console.log).toHaveBeenCalledTimes(1);
    const deposit = await runExample(exampleIn('recipes/access-from-anywhere'), bench.scope(express()), 'deposit');
    await expect(deposit('c', 1)).rejects.toMatchObject({ code: 'ERR_SESSION_MISSING' });
  });
});

describe('the example of a job that is repeated', () => {
  it('closes the day in spite of a serialization failure', async () => {
    await bench.database.admin('entries').insert({ account: 'a', amount: 1 });
    await bench.database.admin.raw(`
      CREATE SEQUENCE attempts;
      CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$
      BEGIN
        IF nextval('attempts') = 1 THEN RAISE EXCEPTION 'restart transaction' USING errcode = '40001'; END IF;
        RETURN NULL;
      END $$;
      CREATE CONSTRAINT TRIGGER fail_once AFTER UPDATE ON entries DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail_once()`);
    const console = { log: jest.fn() };
    await runExample(exampleIn('scaling'), { ...bench.scope(express()), console });
    expect(console.log).toHaveBeenCalledWith(1);
    expect(await bench.database.admin('entries').pluck('day')).toEqual([1]);
  });
});
