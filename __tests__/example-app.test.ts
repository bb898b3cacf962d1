import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { createServer, get, type IncomingMessage, type Server } from 'node:http';
import type { AddressInfo, Socket } from 'node:net';
import { SessionTimeoutError } from 'express-knex-session';
import type { Knex } from 'knex';
import request from 'supertest';
import { createApp } from '../example-app/app';
import { configFor } from '../example-app/database';
import { migrate, migrationSource } from '../example-app/migrations';
import { seedIfEmpty } from '../example-app/seed';
import { toProblem } from '../example-app/to-problem';
import { createDatabase, type TestDatabase } from './support/database';
import { eventually, poolUsage } from './support/pool';

let database: TestDatabase;
let knex: Knex;
let server: Server;
const logged: unknown[] = [];

beforeAll(async () => {
  database = await createDatabase();
  knex = database.knex(configFor(database.url));
  await migrate(knex);
  server = serve(knex);
});

beforeEach(() => {
  logged.length = 0;
});

afterAll(async () => {
  server.closeAllConnections();
  server.close();
  await database.drop();
});

describe('when an account is created', () => {
  it('is stored, empty, under the id of its Location', async () => {
    const response = await request(server).post('/accounts').send({ name: ' Ada ' }).expect(201);

    expect(response.body).toEqual({ id: expect.any(String), name: 'Ada', kind: 'customer', balance: '0', createdAt: expect.any(String) });
    expect(response.headers['location']).toBe(`/accounts/${response.body.id}`);
    await request(server)
      .get(`/accounts/${response.body.id}`)
      .expect(200, { ...response.body, entries: [] });
  });
});

describe('when a transfer is made', () => {
  it('stores it and exactly its two entries', async () => {
    const { from, to } = await twoAccounts({ balance: 1000 });
    const id = randomUUID();

    const response = await request(server).post('/transfers').send({ id, from, to, amount: 400, memo: 'Lunch' }).expect(201);

    expect(response.body).toEqual({ id, from, to, amount: '400', memo: 'Lunch', createdAt: expect.any(String) });
    expect(response.headers['location']).toBe(`/transfers/${id}`);
    await request(server).get(`/transfers/${id}`).expect(200, response.body);
    expect(await entriesOf(id)).toEqual([
      { account_id: from, amount: '-400' },
      { account_id: to, amount: '400' },
    ]);
    expect(await balanceOf(from)).toBe('600');
    expect(await balanceOf(to)).toBe('400');
  });

  it('shows in the accounts, newest first', async () => {
    const { from, to } = await twoAccounts({ balance: 1000 });
    await transfer({ from, to, amount: 1, memo: 'first' }).expect(201);
    await transfer({ from, to, amount: 2, memo: 'second' }).expect(201);

    const { body } = await request(server).get(`/accounts/${to}`).expect(200);

    expect(body).toMatchObject({
      balance: '3',
      entries: [
        { memo: 'second', amount: '2' },
        { memo: 'first', amount: '1' },
      ],
    });
  });

  it('shows in an account either with its entry and in the balance, or not at all', async () => {
    const { from, to } = await twoAccounts({ balance: 1000 });
    const underWay = await database.admin.transaction();
    // The first query of the request passes, its second one waits until this transfer is committed.
    await underWay.raw('lock table transfers in access exclusive mode');
    await underWay.raw(
      `with new as (insert into transfers (id, memo) values (gen_random_uuid(), '') returning id)
      insert into entries (transfer_id, account_id, amount)
      select new.id, account::uuid, amount from new, (values (:from, -7), (:to, 7)) as sides (account, amount)`,
      { from, to },
    );
    const response = send(request(server).get(`/accounts/${to}`));
    await eventually(async () => expect(await activity("wait_event_type = 'Lock'")).toHaveLength(1));

    await underWay.commit();

    expect((await response).body).toMatchObject({ balance: '0', entries: [] });
    await request(server)
      .get(`/accounts/${to}`)
      .expect(200)
      .expect(({ body }) => expect(body).toMatchObject({ balance: '7', entries: [{ amount: '7' }] }));
  });

  it('keeps every digit of amounts above 2^53 cents', async () => {
    const { to } = await twoAccounts();
    for (let i = 0; i < 10; i++) await transfer({ from: await externalAccount(), to, amount: '999999999999999' }).expect(201);

    const { body } = await request(server).get(`/accounts/${to}`).expect(200);

    expect(body.balance).toBe('9999999999999990');
  });
});

describe('when a transfer overdraws an account', () => {
  it('fails at COMMIT: the client gets the problem, and nothing is stored', async () => {
    const { from, to } = await twoAccounts({ balance: 1000 });
    const id = randomUUID();
    const before = await rows();

    const response = await transfer({ id, from, to, amount: 1001 }).expect(409);

    expect(response.headers['content-type']).toBe('application/problem+json; charset=utf-8');
    expect(response.body).toEqual({
      type: 'https://ledger.example/problems/overdrawn',
      title: 'The account does not have that much',
      status: 409,
    });
    expect(await rows()).toEqual(before);
    expect(await balanceOf(from)).toBe('1000');
    expect(await balanceOf(to)).toBe('0');
    await request(server).get(`/transfers/${id}`).expect(404);
  });

  it('leaves no header of the 201 on the problem', async () => {
    const { from, to } = await twoAccounts();

    const { headers } = await transfer({ from, to, amount: 1 }).expect(409);

    expect(headers).not.toHaveProperty('location');
  });

  it('can be sent again with the same id when there is money', async () => {
    const { from, to } = await twoAccounts();
    const wanted = { id: randomUUID(), from, to, amount: 5 };
    await transfer(wanted).expect(409);
    await transfer({ from: await externalAccount(), to: from, amount: 5 }).expect(201);

    await transfer(wanted).expect(201);

    expect(await balanceOf(to)).toBe('5');
  });
});

describe('when parallel transfers overdraw an account only together', () => {
  it('lets one of them through', async () => {
    const { from, to } = await twoAccounts({ balance: 1000 });

    const responses = await Promise.all(Array.from({ length: 8 }, () => transfer({ from, to, amount: 600 })));

    expect(responses.map(({ status }) => status).sort()).toEqual([201, ...Array(7).fill(409)]);
    expect(await balanceOf(from)).toBe('400');
    expect(await balanceOf(to)).toBe('600');
  });
});

describe('when transfers go both ways at once', () => {
  it('makes one wait for the other, instead of a deadlock', async () => {
    const { from, to } = await twoAccounts({ balance: 1000 });
    await transfer({ from: await externalAccount(), to, amount: 1000 }).expect(201);

    // If each took its own `from` first, the second one would hold what the first one waits for next.
    const answers = await whileLocked(to, async () => {
      const first = send(transfer({ from: to, to: from, amount: 5 }));
      await eventually(async () => expect(await waitingCommits()).toHaveLength(1));
      const second = send(transfer({ from, to, amount: 7 }));
      await eventually(async () => expect(await waitingCommits()).toHaveLength(2));
      return [first, second];
    });

    expect((await Promise.all(answers)).map(({ status }) => status)).toEqual([201, 201]);
  });

  it('stores all of them, and balances are the sums of their entries', async () => {
    const { from, to } = await twoAccounts({ balance: 1000 });
    await transfer({ from: await externalAccount(), to, amount: 1000 }).expect(201);

    const responses = await Promise.all(
      Array.from({ length: 40 }, (_, i) => transfer(i % 2 ? { from, to, amount: 7 } : { from: to, to: from, amount: 5 })),
    );

    expect(new Set(responses.map(({ status }) => status))).toEqual(new Set([201]));
    const { rows: wrong } = await database.admin.raw(
      'select id from accounts where balance <> (select coalesce(sum(amount), 0) from entries where account_id = accounts.id)',
    );
    expect(wrong).toEqual([]);
  });
});

describe('when SQL from elsewhere deadlocks with a transfer', () => {
  it('asks the client to send it again, and it works then', async () => {
    const { from, to } = await twoAccounts({ balance: 1000 });
    const [first, last] = [from, to].sort() as [string, string];
    const wanted = { id: randomUUID(), from, to, amount: 10 };
    const other = await database.admin.transaction();
    await other.raw("set local deadlock_timeout = '1min'"); // So that the transfer is the one that gives in.
    await other('accounts').where({ id: last }).forNoKeyUpdate();
    const answer = send(transfer(wanted));
    await eventually(async () => expect(await waitingCommits()).toHaveLength(1));
    const locked = other('accounts').where({ id: first }).forNoKeyUpdate();
    await locked.then(() => other.rollback());

    const { status, headers, body } = await answer;
    expect({ status, headers, body }).toMatchObject({
      status: 503,
      headers: { 'retry-after': '1' },
      body: { detail: expect.stringContaining('again') },
    });
    expect(await entriesOf(wanted.id)).toEqual([]);
    await transfer(wanted).expect(201);
  });
});

describe('when a transfer is sent again', () => {
  it('answers the stored one and moves nothing', async () => {
    const { from, to } = await twoAccounts({ balance: 1000 });
    const wanted = { id: randomUUID(), from, to, amount: 10, memo: 'once' };
    const first = await transfer(wanted).expect(201);

    const second = await transfer({ ...wanted, id: wanted.id.toUpperCase(), amount: '10' }).expect(200);

    expect(second.body).toEqual(first.body);
    expect(await balanceOf(to)).toBe('10');
  });

  it('moves once when both requests come at the same time', async () => {
    const { from, to } = await twoAccounts({ balance: 1000 });
    const wanted = { id: randomUUID(), from, to, amount: 10 };

    const responses = await Promise.all(Array.from({ length: 6 }, () => transfer(wanted)));

    expect(responses.map(({ status }) => status).sort()).toEqual([200, 200, 200, 200, 200, 201]);
    expect(await balanceOf(to)).toBe('10');
  });

  it.each([{ amount: 11 }, { memo: 'other' }, { to: 'another account' }])('refuses its id for another transfer: %j', async (change) => {
    const { from, to } = await twoAccounts({ balance: 1000 });
    const wanted = { id: randomUUID(), from, to, amount: 10 };
    await transfer(wanted).expect(201);
    if (change.to) change.to = await externalAccount();

    const { body } = await transfer({ ...wanted, ...change }).expect(409);

    expect(body).toMatchObject({ type: expect.stringContaining('id-taken') });
    expect(JSON.stringify(body)).not.toContain(from);
    expect(await balanceOf(to)).toBe('10');
  });
});

describe('when the connection is lost during COMMIT', () => {
  it('says that the outcome is unknown, and sending it again settles it', async () => {
    const { from, to } = await twoAccounts({ balance: 1000 });
    const wanted = { id: randomUUID(), from, to, amount: 10 };

    const response = await whileLocked(from, async () => {
      const answer = send(transfer(wanted));
      const [waiting] = await eventually(async () => {
        const found = await waitingCommits();
        expect(found).toHaveLength(1);
        return found;
      });
      await database.admin.raw('select pg_terminate_backend(?)', [waiting?.pid ?? 0]);
      return answer;
    });

    expect(response.status).toBe(500);
    expect(response.body).toMatchObject({ type: expect.stringContaining('outcome-unknown'), detail: expect.stringContaining('same id') });
    expect(logged).toHaveLength(1);
    await transfer(wanted).expect(201);
    await transfer(wanted).expect(200);
    expect(await balanceOf(to)).toBe('10');
  });
});

describe('when SQL goes around the API', () => {
  it('refuses an unbalanced transfer at COMMIT', async () => {
    const { from, to } = await twoAccounts({ balance: 1000 });
    const id = randomUUID();
    const before = await rows();

    const insert = (amounts: [string, number][]) =>
      database.admin.raw(`
        begin;
        insert into transfers (id, memo) values ('${id}', '');
        ${amounts.map(([account, amount]) => `insert into entries (transfer_id, account_id, amount) values ('${id}', '${account}', ${amount});`).join('\n')}
        commit;
      `);

    await expect(insert([[to, 5]])).rejects.toMatchObject({ code: '23514', constraint: 'entries_sum_to_zero' });
    await expect(
      insert([
        [from, -5],
        [to, 6],
      ]),
    ).rejects.toMatchObject({ constraint: 'entries_sum_to_zero' });
    expect(await rows()).toEqual(before);
  });

  it('lets an account pass on money that comes later in the same transaction', async () => {
    const { from, to } = await twoAccounts();
    const world = await externalAccount();

    await database.admin.transaction(async (trx) => {
      const ids = [randomUUID(), randomUUID()];
      await trx('transfers').insert(ids.map((id) => ({ id, memo: '' })) as never);
      await trx('entries').insert([
        { transfer_id: ids[0], account_id: from, amount: -5 },
        { transfer_id: ids[0], account_id: to, amount: 5 },
        { transfer_id: ids[1], account_id: world, amount: -5 },
        { transfer_id: ids[1], account_id: from, amount: 5 },
      ] as never);
    });

    expect(await balanceOf(to)).toBe('5');
  });

  it.each(['update entries set amount = amount * 2', 'delete from entries', 'truncate entries'])('refuses: %s', async (sql) => {
    await expect(database.admin.raw(sql)).rejects.toMatchObject({ constraint: 'entries_final' });
  });
});

describe('when the input is not valid', () => {
  const id = '6f1d3c5e-0000-4000-8000-000000000001';
  const other = '6f1d3c5e-0000-4000-8000-000000000002';
  const good = { id, from: id, to: other, amount: 1 };

  it.each([
    ['no fields', '/transfers', {}, ['id', 'from', 'to', 'amount']],
    ['a list', '/transfers', [], ['']],
    ['a bad id', '/transfers', { ...good, from: "'; drop table entries; --" }, ['from']],
    ['the same account twice', '/transfers', { ...good, to: id }, ['to']],
    ['zero', '/transfers', { ...good, amount: 0 }, ['amount']],
    ['less than zero', '/transfers', { ...good, amount: -1 }, ['amount']],
    ['half a cent', '/transfers', { ...good, amount: 0.5 }, ['amount']],
    ['a decimal point', '/transfers', { ...good, amount: '12.50' }, ['amount']],
    ['a number that JSON rounds', '/transfers', { ...good, amount: 2 ** 53 }, ['amount']],
    ['more than bigint', '/transfers', { ...good, amount: '9'.repeat(30) }, ['amount']],
    ['U+0000, which PostgreSQL refuses', '/transfers', { ...good, memo: 'a\0b' }, ['memo']],
    ['half a surrogate pair', '/transfers', { ...good, memo: '\ud800' }, ['memo']],
    ['an unknown field', '/transfers', { ...good, currency: 'EUR' }, ['']],
    ['an empty name', '/accounts', { name: ' ' }, ['name']],
    ['a long name', '/accounts', { name: 'x'.repeat(201) }, ['name']],
    ['an unknown kind', '/accounts', { name: 'Ada', kind: 'bank' }, ['kind']],
  ])('names the fields: %s', async (_name, path, body, fields) => {
    const response = await request(server)
      .post(path)
      .send(body)
      .expect(400)
      .expect('content-type', /^application\/problem\+json/);

    expect(response.body).toMatchObject({ type: expect.stringContaining('invalid-input'), status: 400 });
    expect(response.body.errors.map(({ field }: { field: string }) => field)).toEqual(fields);
  });

  it.each([
    ['JSON that does not parse', 400, 'invalid-json', { body: '{"name": "Ada' }],
    ['a JSON value that is no object', 400, 'invalid-json', { body: '"Ada"' }],
    ['another content type', 415, 'unsupported-media-type', { body: 'name=Ada', contentType: 'application/x-www-form-urlencoded' }],
    ['an unknown charset', 415, 'unsupported-media-type', { body: '{}', contentType: 'application/json; charset=x-user' }],
    ['no content type', 415, 'unsupported-media-type', {}],
    ['an empty body', 400, 'invalid-input', { body: '' }],
    ['a body of 11 kB', 413, 'payload-too-large', { body: JSON.stringify({ name: 'x'.repeat(11_000) }) }],
  ])('says so: %s', async (_name, status, type, { body, contentType = 'application/json' }: { body?: string; contentType?: string }) => {
    const sent = request(server).post('/accounts');
    const response = await (body === undefined ? sent : sent.type(contentType).send(body));
    expect(response.status).toBe(status);
    expect(response.headers['content-type']).toMatch(/^application\/problem\+json/);
    expect(response.body).toMatchObject({ type: `https://ledger.example/problems/${type}`, status });
  });

  it('takes no connection', async () => {
    await withPool({ max: 1 }, async (pool, app) => {
      await request(app).post('/transfers').send({}).expect(400);
      expect(poolUsage(pool)).toEqual({ used: 0, free: 0, pendingAcquires: 0 });
    });
  });
});

describe('when something does not exist', () => {
  const missing = '6f1d3c5e-0000-4000-8000-000000000001';

  it.each([
    ['an account', 404, 'not-found', `/accounts/${missing}`],
    ['its statement', 404, 'not-found', `/accounts/${missing}/statement.csv`],
    ['a transfer', 404, 'not-found', `/transfers/${missing}`],
    ['a route', 404, 'not-found', '/nowhere'],
    ['an id that is none', 400, 'invalid-input', '/accounts/1'],
    ['a path that does not decode', 400, 'bad-request', '/accounts/%E0%A4%A'],
  ])('answers a problem: %s', async (_name, status, type, path) => {
    const response = await request(server)
      .get(path)
      .expect(status)
      .expect('content-type', /^application\/problem\+json/);
    expect(response.body).toMatchObject({ type: `https://ledger.example/problems/${type}`, status });
  });

  it.each(['from', 'to'])('stores nothing of a transfer whose account is missing: %s', async (side) => {
    const { from, to } = await twoAccounts({ balance: 10 });
    const before = await rows();

    const { body } = await transfer({ from, to, amount: 1, [side]: missing }).expect(422);

    expect(body).toEqual({
      type: 'https://ledger.example/problems/unknown-account',
      title: 'The transfer names an account that does not exist',
      status: 422,
    });
    expect(await rows()).toEqual(before);
  });
});

describe('when something unexpected fails', () => {
  it.each(['', '/statement.csv'])('answers a bare 500, and logs the error: /accounts/:id%s', async (path) => {
    const id = await externalAccount();
    await database.admin.raw('alter table transfers rename to moved');
    try {
      const { body, headers } = await request(server).get(`/accounts/${id}${path}`).expect(500);
      expect(body).toEqual({
        type: 'https://ledger.example/problems/internal-server-error',
        title: 'Internal Server Error',
        status: 500,
      });
      expect(headers).not.toHaveProperty('content-disposition');
    } finally {
      await database.admin.raw('alter table moved rename to transfers');
    }
    expect(logged).toEqual([expect.objectContaining({ code: '42P01' })]);
  });
});

describe('when a statement is downloaded', () => {
  it('has every entry, oldest first', async () => {
    const { from, to } = await twoAccounts();
    await transfer({ from: await externalAccount(), to, amount: 7, memo: 'Salary, "May"' }).expect(201);
    await transfer({ from: to, to: from, amount: 2, memo: '=1+1' }).expect(201);

    const { text, headers } = await request(server).get(`/accounts/${to}/statement.csv`).expect(200);

    expect(headers['content-type']).toBe('text/csv; charset=utf-8');
    expect(headers['content-disposition']).toBe('attachment; filename=statement.csv');
    expect(text.replaceAll(/^20[^,]+,[0-9a-f-]{36}/gm, 'date,id')).toBe(
      // A spreadsheet runs what begins with an equals sign.
      `date,transfer,memo,amount\ndate,id,"Salary, ""May""",7\ndate,id,'=1+1,-2\n`,
    );
  });

  it('has only a heading if there are none', async () => {
    const id = await externalAccount();
    await request(server).get(`/accounts/${id}/statement.csv`).expect(200, 'date,transfer,memo,amount\n');
  });

  it('has several thousand rows, and gives its connection back', async () => {
    const id = await externalAccount();
    await addEntries(id, 5_000);

    const { text } = await request(server).get(`/accounts/${id}/statement.csv`).expect(200);

    const lines = text.trimEnd().split('\n').slice(1);
    expect(lines).toHaveLength(5_000);
    expect(lines.at(-1)).toMatch(/,5000$/);
    await eventually(() => expect(poolUsage(knex).used).toBe(0));
  });
});

describe('when the reader of a statement is slow', () => {
  const memo = 'x'.repeat(200);
  let id: string;

  beforeAll(async () => {
    id = await externalAccount();
    await addEntries(id, 100_000, memo);
  });

  it('reads no further in the database than the client takes', async () => {
    await withPool({ max: 1 }, async (pool, app) => {
      const { response, socket } = await open(app, `/accounts/${id}/statement.csv`);
      const sent = await untilStill(() => socket.bytesWritten + socket.writableLength);
      expect(sent).toBeLessThan(20_000_000);

      let bytes = 0;
      for await (const chunk of response) bytes += chunk.length;

      expect(bytes).toBeGreaterThan(25_000_000);
      await eventually(() => expect(poolUsage(pool).used).toBe(0));
    });
  });

  it('gives the connection back when the reader leaves in the middle', async () => {
    await withPool({ max: 1 }, async (pool, app) => {
      const { response } = await open(app, `/accounts/${id}/statement.csv`);
      expect(poolUsage(pool).used).toBe(1);

      response.destroy();

      await eventually(() => expect(poolUsage(pool).used).toBe(0));
      expect(logged).toEqual([]);
    });
  });

  it('cuts the connection when the database fails in the middle', async () => {
    await withPool({ max: 1 }, async (_pool, app) => {
      const { response } = await open(app, `/accounts/${id}/statement.csv`);
      const [reading] = await activity("application_name = 'ledger' and query like '%entries%' and state = 'active'");
      await database.admin.raw('select pg_terminate_backend(?)', [reading?.pid ?? 0]);

      await expect(async () => {
        for await (const _ of response);
      }).rejects.toThrow('aborted');
      expect(logged).toHaveLength(1);
    });
  });
});

describe('when the pool is exhausted', () => {
  it('still answers /health', async () => {
    await withPool({ max: 1 }, async (pool, app) => {
      const taken = await pool.transaction();
      await taken.raw('select 1');

      const { body } = await request(app).get('/health').expect(200);

      expect(body).toEqual({ status: 'ok', sessions: { open: 0, waiting: 0, committed: 0, rolledBack: 0, unknown: 0 } });
      expect(poolUsage(pool)).toMatchObject({ used: 1, pendingAcquires: 0 });
      await taken.rollback();
    });
  });
});

describe('when the database is down', () => {
  it('answers 503 with Retry-After, and /health as always', async () => {
    const pool = database.knex(configFor('postgres://nobody@127.0.0.1:1/none'));
    const app = serve(pool);

    const response = await request(app).get(`/accounts/${randomUUID()}`).expect(503).expect('retry-after', '1');

    expect(response.body).toMatchObject({ type: expect.stringContaining('busy'), status: 503 });
    await request(app).get('/health').expect(200);
    app.close();
  });
});

describe('when a request takes too long', () => {
  it('says so, and that nothing was stored', () => {
    const { status, headers, body } = toProblem(new SessionTimeoutError(10_000));
    expect({ status, headers, body }).toMatchObject({
      status: 503,
      headers: { 'retry-after': '1' },
      body: { detail: expect.stringMatching('nothing was stored') },
    });
  });
});

describe('when the ledger is empty', () => {
  it('is seeded once', async () => {
    const fresh = await createDatabase();
    const pool = fresh.knex(configFor(fresh.url));
    await migrate(pool);

    await seedIfEmpty(pool);
    await seedIfEmpty(pool);

    expect(await fresh.admin('accounts').orderBy('name').pluck('balance')).toEqual(['98750', '3750', '-102500']);
    await fresh.drop();
  });
});

describe('when the migrations are undone', () => {
  it('leaves nothing behind', async () => {
    const fresh = await createDatabase();
    const pool = fresh.knex(configFor(fresh.url));
    await migrate(pool);

    await pool.migrate.rollback({ migrationSource }, true);

    const { rows } = await fresh.admin.raw(
      "select relname as name from pg_class where relnamespace = 'public'::regnamespace and relname not like 'knex_%' union all select proname from pg_proc where pronamespace = 'public'::regnamespace",
    );
    expect(rows).toEqual([]);
    await fresh.drop();
  });
});

function serve(pool: Knex): Server {
  return createServer(createApp(pool, (error) => logged.push(error)).app).listen(0);
}

async function withPool(poolConfig: Knex.PoolConfig, use: (pool: Knex, app: Server) => Promise<void>): Promise<void> {
  const pool = database.knex({ ...configFor(database.url), pool: { min: 0, ...poolConfig } });
  const app = serve(pool);
  try {
    await use(pool, app);
  } finally {
    app.closeAllConnections();
    app.close();
  }
}

async function createAccount(kind: 'customer' | 'external'): Promise<string> {
  const { body } = await request(server).post('/accounts').send({ name: 'Test', kind }).expect(201);
  return body.id;
}

const externalAccount = () => createAccount('external');

async function twoAccounts({ balance = 0 } = {}): Promise<{ from: string; to: string }> {
  const from = await createAccount('customer');
  const to = await createAccount('customer');
  if (balance > 0) await transfer({ from: await externalAccount(), to: from, amount: balance }).expect(201);
  return { from, to };
}

function transfer(body: { id?: string; from: string; to: string; amount: number | string; memo?: string }): request.Test {
  return request(server)
    .post('/transfers')
    .send({ id: randomUUID(), ...body });
}

/** supertest sends a request only when it is awaited. */
const send = (test: request.Test): Promise<request.Response> => test.then((response) => response);

function entriesOf(transferId: string): Promise<unknown[]> {
  return database.admin('entries').where('transfer_id', transferId).orderBy('amount').select('account_id', 'amount') as never;
}

async function balanceOf(id: string): Promise<unknown> {
  const account = await database.admin('accounts').where({ id }).first();
  return account?.balance;
}

async function rows(): Promise<unknown> {
  const { rows } = await database.admin.raw(
    'select (select count(*) from transfers) as transfers, (select count(*) from entries) as entries',
  );
  return rows;
}

/** Many entries of 1, 2, 3 ... cents; without the triggers, which would take minutes. */
async function addEntries(accountId: string, count: number, memo = ''): Promise<void> {
  await database.admin.transaction(async (trx) => {
    await trx.raw('set local session_replication_role = replica');
    await trx.raw(
      `with new as (select gen_random_uuid() as id, n from generate_series(1, :count::int) n),
        _ as (insert into transfers (id, memo) select id, :memo from new)
      insert into entries (transfer_id, account_id, amount) select id, :accountId, n from new order by n`,
      { accountId, count, memo },
    );
  });
}

/** What the sessions on this database do. */
async function activity(condition: string): Promise<{ pid: number }[]> {
  const { rows } = await database.admin.raw(`select pid from pg_stat_activity where datname = current_database() and ${condition}`);
  return rows;
}

const waitingCommits = () => activity("wait_event_type = 'Lock' and query ilike 'commit%'");

async function whileLocked<T>(accountId: string, use: () => Promise<T>): Promise<T> {
  const lock = await database.admin.transaction();
  try {
    await lock('accounts').where({ id: accountId }).forNoKeyUpdate();
    return await use();
  } finally {
    await lock.rollback();
  }
}

/** A response of which nothing is read yet, and the server's end of its connection. */
async function open(app: Server, path: string): Promise<{ response: IncomingMessage; socket: Socket }> {
  const connected = once(app, 'connection');
  const [response] = (await once(get({ port: (app.address() as AddressInfo).port, path, agent: false }), 'response')) as [IncomingMessage];
  const [socket] = (await connected) as [Socket];
  return { response, socket };
}

async function untilStill(measure: () => number): Promise<number> {
  for (let last = measure(); ; ) {
    await new Promise((resolve) => setTimeout(resolve, 200));
    const now = measure();
    if (now === last && now > 0) return now;
    last = now;
  }
}
