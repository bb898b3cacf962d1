import { randomUUID } from 'node:crypto';
import type { Express } from 'express';
import { type TestDatabase, testDatabase } from 'express-knex-session/testing';
import request from 'supertest';
import { createApp } from '../example-app/app';
import { configFor } from '../example-app/database';
import { Journal, type Transfer } from '../example-app/journal';
import { migrate, migrationSource } from '../example-app/migrations';
import { seedIfEmpty } from '../example-app/seed';
import { createDatabase, type TestDatabase as Server } from './support/database';
import { addEntries, balanceOf, externalAccount, transfer, twoAccounts } from './support/example-app-requests';
import { eventually, poolUsage } from './support/pool';

/*
 * How to test an app with 'express-knex-session/testing': requests go to the app, and what they have stored is looked up through the same
 * `knex`. Nothing is cleaned up, and no test sees rows of another. That a transfer is refused at COMMIT is seen here too: the rules of the
 * ledger are deferred constraint triggers, and the kit runs them where the COMMIT would be.
 *
 * What the kit cannot show is tested without it: requests that race, locks and deadlocks, a connection that is lost during COMMIT
 * (example-app-races.test.ts), the pool and slow readers (example-app-pool.test.ts), servers and signals (example-app-server.test.ts).
 *
 * In a project of one's own, the first three lines of beforeAll are the affair of a global setup: see "Testing your app" in the README.
 */
let server: Server;
let database: TestDatabase;
let app: Express;
const notified: Transfer[] = [];

beforeAll(async () => {
  server = await createDatabase();
  const knex = server.knex(configFor(server.url));
  await migrate(knex);

  // What GET /accounts/:id asks for: in the transaction of a test, no request can have another level.
  database = testDatabase(knex, { isolationLevel: 'repeatable read' });
  ({ app } = createApp(database.knex, { notify: (transfer) => notified.push(transfer) }));
});
beforeEach(() => {
  notified.length = 0;
  return database.begin();
});
afterEach(() => database.rollback());
afterAll(() => server.drop());

describe('when an account is created', () => {
  it('is stored, empty, under the id of its Location', async () => {
    const response = await request(app).post('/accounts').send({ name: ' Ada ' }).expect(201);

    expect(response.body).toEqual({ id: expect.any(String), name: 'Ada', kind: 'customer', balance: '0', createdAt: expect.any(String) });
    expect(response.headers['location']).toBe(`/accounts/${response.body.id}`);
    await request(app)
      .get(`/accounts/${response.body.id}`)
      .expect(200, { ...response.body, entries: [] });
  });
});

describe('when a transfer is made', () => {
  it('stores it and exactly its two entries', async () => {
    const { from, to } = await twoAccounts(app, { balance: 1000 });
    const id = randomUUID();

    const response = await request(app).post('/transfers').send({ id, from, to, amount: 400, memo: 'Lunch' }).expect(201);

    expect(response.body).toEqual({ id, from, to, amount: '400', memo: 'Lunch', createdAt: expect.any(String) });
    expect(response.headers['location']).toBe(`/transfers/${id}`);
    await request(app).get(`/transfers/${id}`).expect(200, response.body);
    expect(await entriesOf(id)).toEqual([
      { account_id: from, amount: -400n },
      { account_id: to, amount: 400n },
    ]);
    expect(await balanceOf(database.knex, from)).toBe('600');
    expect(await balanceOf(database.knex, to)).toBe('400');
  });

  it('shows in the accounts, newest first', async () => {
    const { from, to } = await twoAccounts(app, { balance: 1000 });
    await transfer(app, { from, to, amount: 1, memo: 'first' }).expect(201);
    await transfer(app, { from, to, amount: 2, memo: 'second' }).expect(201);

    const { body } = await request(app).get(`/accounts/${to}`).expect(200);

    expect(body).toMatchObject({
      balance: '3',
      entries: [
        { memo: 'second', amount: '2' },
        { memo: 'first', amount: '1' },
      ],
    });
  });

  it('is told to whoever wants to know', async () => {
    const { from, to } = await twoAccounts(app, { balance: 1000 });
    notified.length = 0; // The money that `from` has came by a transfer, too.

    await transfer(app, { from, to, amount: 1, memo: 'told' }).expect(201);

    expect(notified).toMatchObject([{ from, to, amount: 1n, memo: 'told' }]);
  });

  it('says in its row which request it was', async () => {
    const { from, to } = await twoAccounts(app, { balance: 1000 });
    const id = randomUUID();

    const { headers } = await transfer(app, { id, from, to, amount: 1 }).expect(201);

    expect(headers['x-request-id']).toEqual(expect.any(String));
    expect(await requestOf(id)).toBe(headers['x-request-id']);
  });

  it('keeps every digit of amounts above 2^53 cents', async () => {
    const { to } = await twoAccounts(app);
    for (let i = 0; i < 10; i++) await transfer(app, { from: await externalAccount(app), to, amount: '999999999999999' }).expect(201);

    const { body } = await request(app).get(`/accounts/${to}`).expect(200);

    expect(body.balance).toBe('9999999999999990');
  });
});

describe('when a transfer overdraws an account', () => {
  it('fails at COMMIT: the client gets the problem, and nothing is stored', async () => {
    const { from, to } = await twoAccounts(app, { balance: 1000 });
    const id = randomUUID();
    const before = await rows();

    const response = await transfer(app, { id, from, to, amount: 1001 }).expect(409);

    expect(response.headers['content-type']).toBe('application/problem+json; charset=utf-8');
    expect(response.body).toEqual({
      type: 'https://ledger.example/problems/overdrawn',
      title: 'The account does not have that much',
      status: 409,
    });
    expect(await rows()).toEqual(before);
    expect(await balanceOf(database.knex, from)).toBe('1000');
    expect(await balanceOf(database.knex, to)).toBe('0');
    await request(app).get(`/transfers/${id}`).expect(404);
  });

  it('leaves no header of the 201 on the problem', async () => {
    const { from, to } = await twoAccounts(app);

    const { headers } = await transfer(app, { from, to, amount: 1 }).expect(409);

    expect(headers).not.toHaveProperty('location');
  });

  it('tells nobody', async () => {
    const { from, to } = await twoAccounts(app);
    await transfer(app, { from, to, amount: 1 }).expect(409);
    expect(notified).toEqual([]);
  });

  it('can be sent again with the same id when there is money', async () => {
    const { from, to } = await twoAccounts(app);
    const wanted = { id: randomUUID(), from, to, amount: 5 };
    await transfer(app, wanted).expect(409);
    await transfer(app, { from: await externalAccount(app), to: from, amount: 5 }).expect(201);

    await transfer(app, wanted).expect(201);

    expect(await balanceOf(database.knex, to)).toBe('5');
  });
});

describe('when a transfer is sent again', () => {
  it('answers the stored one and moves nothing', async () => {
    const { from, to } = await twoAccounts(app, { balance: 1000 });
    const wanted = { id: randomUUID(), from, to, amount: 10, memo: 'once' };
    const first = await transfer(app, wanted).expect(201);

    const second = await transfer(app, { ...wanted, id: wanted.id.toUpperCase(), amount: '10' }).expect(200);

    expect(second.body).toEqual(first.body);
    expect(await balanceOf(database.knex, to)).toBe('10');
    expect(notified.filter(({ id }) => id === wanted.id)).toHaveLength(1);
    expect(await requestOf(wanted.id)).toBe(first.headers['x-request-id']);
  });

  it.each([{ amount: 11 }, { memo: 'other' }, { to: 'another account' }])('refuses its id for another transfer: %j', async (change) => {
    const { from, to } = await twoAccounts(app, { balance: 1000 });
    const wanted = { id: randomUUID(), from, to, amount: 10 };
    await transfer(app, wanted).expect(201);
    if (change.to) change.to = await externalAccount(app);

    const { body } = await transfer(app, { ...wanted, ...change }).expect(409);

    expect(body).toMatchObject({ type: expect.stringContaining('id-taken') });
    expect(JSON.stringify(body)).not.toContain(from);
    expect(await balanceOf(database.knex, to)).toBe('10');
  });
});

describe('when SQL goes around the API', () => {
  it('stores no request, also on a connection that has served one', async () => {
    const { from, to } = await twoAccounts(app, { balance: 1000 });
    const id = randomUUID();

    await database.knex.transaction((trx) => new Journal(trx).post({ id, from, to, amount: 5n, memo: '' }));

    expect(await requestOf(id)).toBeNull();
  });

  it('refuses an unbalanced transfer at COMMIT', async () => {
    const { from, to } = await twoAccounts(app, { balance: 1000 });
    const before = await rows();

    const insert = (amounts: [account: string, amount: bigint][]) =>
      database.knex.transaction(async (trx) => {
        const id = randomUUID();
        await trx('transfers').insert({ id, memo: '' });
        await trx('entries').insert(amounts.map(([account, amount]) => ({ transfer_id: id, account_id: account, amount })));
      });

    await expect(insert([[to, 5n]])).rejects.toMatchObject({ code: '23514', constraint: 'entries_sum_to_zero' });
    await expect(
      insert([
        [from, -5n],
        [to, 6n],
      ]),
    ).rejects.toMatchObject({ constraint: 'entries_sum_to_zero' });
    expect(await rows()).toEqual(before);
  });

  it('lets an account pass on money that comes later in the same transaction', async () => {
    const { from, to } = await twoAccounts(app);
    const world = await externalAccount(app);

    await database.knex.transaction(async (trx) => {
      const [first, second] = [randomUUID(), randomUUID()];
      await trx('transfers').insert([
        { id: first, memo: '' },
        { id: second, memo: '' },
      ]);
      await trx('entries').insert([
        { transfer_id: first, account_id: from, amount: -5n },
        { transfer_id: first, account_id: to, amount: 5n },
        { transfer_id: second, account_id: world, amount: -5n },
        { transfer_id: second, account_id: from, amount: 5n },
      ]);
    });

    expect(await balanceOf(database.knex, to)).toBe('5');
  });

  it.each(['update entries set amount = amount * 2', 'delete from entries', 'truncate entries'])('refuses: %s', async (sql) => {
    await expect(database.knex.raw(sql)).rejects.toMatchObject({ constraint: 'entries_final' });
  });
});

describe('when something is only read', () => {
  it('does so in a transaction that could not write', async () => {
    const { from, to } = await twoAccounts(app, { balance: 1000 });
    const id = randomUUID();
    await transfer(app, { id, from, to, amount: 5 }).expect(201);
    await database.knex.raw('alter table transfers rename to stored'); // Rolled back with the rest of the test.
    await database.knex.raw(
      "create view transfers as select id, created_at, 'read-only: ' || current_setting('transaction_read_only') as memo from stored",
    );

    for (const path of [`/transfers/${id}`, `/accounts/${to}`, `/accounts/${to}/statement.csv`]) {
      const { text } = await request(app).get(path).expect(200);
      expect(text).toContain('read-only: on');
    }
  });
});

describe('when a statement is downloaded', () => {
  it('has every entry, oldest first', async () => {
    const { from, to } = await twoAccounts(app);
    await transfer(app, { from: await externalAccount(app), to, amount: 7, memo: 'Salary, "May"' }).expect(201);
    await transfer(app, { from: to, to: from, amount: 2, memo: '=1+1' }).expect(201);

    const { text, headers } = await request(app).get(`/accounts/${to}/statement.csv`).expect(200);

    expect(headers['content-type']).toBe('text/csv; charset=utf-8');
    expect(headers['content-disposition']).toBe('attachment; filename=statement.csv');
    expect(text.replaceAll(/^20[^,]+,[0-9a-f-]{36}/gm, 'date,id')).toBe(
      // A spreadsheet runs what begins with an equals sign.
      `date,transfer,memo,amount\ndate,id,"Salary, ""May""",7\ndate,id,'=1+1,-2\n`,
    );
  });

  it('has only a heading if there are none', async () => {
    const id = await externalAccount(app);
    await request(app).get(`/accounts/${id}/statement.csv`).expect(200, 'date,transfer,memo,amount\n');
  });

  it('has several thousand rows, and gives its connection back', async () => {
    const id = await externalAccount(app);
    await addEntries(database.knex, id, 5_000);

    const { text } = await request(app).get(`/accounts/${id}/statement.csv`).expect(200);

    const lines = text.trimEnd().split('\n').slice(1);
    expect(lines).toHaveLength(5_000);
    expect(lines.at(-1)).toMatch(/,5000$/);
    await eventually(() => expect(poolUsage(database.knex).used).toBe(0));
  });
});

describe('when the ledger is empty', () => {
  it('is seeded once', async () => {
    await seedIfEmpty(database.knex);
    await seedIfEmpty(database.knex);

    expect(await database.knex('accounts').orderBy('name').pluck('balance')).toEqual([98750n, 3750n, -102500n]);
  });
});

describe('when the migrations are undone', () => {
  it('leaves nothing behind', async () => {
    await database.knex.migrate.rollback({ migrationSource }, true);

    const { rows } = await database.knex.raw(
      "select relname as name from pg_class where relnamespace = 'public'::regnamespace and relname not like 'knex_%' union all select proname from pg_proc where pronamespace = 'public'::regnamespace",
    );
    expect(rows).toEqual([]);
  });
});

async function entriesOf(transferId: string): Promise<unknown[]> {
  return database.knex('entries').where('transfer_id', transferId).orderBy('amount').select('account_id', 'amount');
}

async function requestOf(transferId: string): Promise<string | null | undefined> {
  return (await database.knex('transfers').where('id', transferId).first())?.request_id;
}

async function rows(): Promise<unknown> {
  return { transfers: await database.knex('transfers'), entries: await database.knex('entries') };
}
