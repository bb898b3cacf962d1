import { randomUUID } from 'node:crypto';
import { createServer, type Server } from 'node:http';
import type { Knex } from 'knex';
import request from 'supertest';
import { createApp } from '../example-app/app';
import { configFor } from '../example-app/database';
import type { Transfer } from '../example-app/journal';
import { migrate } from '../example-app/migrations';
import { createDatabase, type TestDatabase } from './support/database';
import { balanceOf, externalAccount, send, transfer, twoAccounts } from './support/example-app-requests';
import { eventually } from './support/pool';

/*
 * Without 'express-knex-session/testing', which has one connection for all: requests that are really under way at once, locks from
 * elsewhere, and a connection that is lost during COMMIT. Their rows stay until the database is dropped.
 */
let database: TestDatabase;
let server: Server;
const logged: unknown[] = [];
const notified: Transfer[] = [];

beforeAll(async () => {
  database = await createDatabase();
  // PostgreSQL looks for a deadlock after a second, otherwise.
  await database.admin.raw("do $$ begin execute format('alter database %I set deadlock_timeout = 200', current_database()); end $$");
  const knex = database.knex(configFor(database.url));
  await migrate(knex);
  const { app } = createApp(knex, { logError: (error) => logged.push(error), notify: (transfer) => notified.push(transfer) });
  server = createServer(app).listen(0);
});

beforeEach(() => {
  logged.length = 0;
  notified.length = 0;
});

afterAll(async () => {
  server.closeAllConnections();
  server.close();
  await database.drop();
});

describe('when parallel transfers overdraw an account only together', () => {
  it('lets one of them through', async () => {
    const { from, to } = await twoAccounts(server, { balance: 1000 });

    const responses = await Promise.all(Array.from({ length: 8 }, () => transfer(server, { from, to, amount: 600 })));

    expect(responses.map(({ status }) => status).sort()).toEqual([201, ...Array(7).fill(409)]);
    expect(await balanceOf(database.admin, from)).toBe('400');
    expect(await balanceOf(database.admin, to)).toBe('600');
  });
});

describe('when transfers go both ways at once', () => {
  it('makes one wait for the other, instead of a deadlock', async () => {
    const { from, to } = await twoAccounts(server, { balance: 1000 });
    await transfer(server, { from: await externalAccount(server), to, amount: 1000 }).expect(201);

    // If each took its own `from` first, the second one would hold what the first one waits for next.
    const answers = await whileLocked(to, async () => {
      const first = send(transfer(server, { from: to, to: from, amount: 5 }));
      await eventually(async () => expect(await waitingCommits()).toHaveLength(1));
      const second = send(transfer(server, { from, to, amount: 7 }));
      await eventually(async () => expect(await waitingCommits()).toHaveLength(2));
      return [first, second];
    });

    expect((await Promise.all(answers)).map(({ status }) => status)).toEqual([201, 201]);
  });

  it('stores all of them, and balances are the sums of their entries', async () => {
    const { from, to } = await twoAccounts(server, { balance: 1000 });
    await transfer(server, { from: await externalAccount(server), to, amount: 1000 }).expect(201);

    const responses = await Promise.all(
      Array.from({ length: 40 }, (_, i) => transfer(server, i % 2 ? { from, to, amount: 7 } : { from: to, to: from, amount: 5 })),
    );

    expect(new Set(responses.map(({ status }) => status))).toEqual(new Set([201]));
    const { rows: wrong } = await database.admin.raw(
      'select id from accounts where balance <> (select coalesce(sum(amount), 0) from entries where account_id = accounts.id)',
    );
    expect(wrong).toEqual([]);
  });
});

describe('when SQL from elsewhere deadlocks with a transfer', () => {
  it('tries again: the client sees one transfer, and it is told once', async () => {
    const { from, to } = await twoAccounts(server, { balance: 1000 });
    const wanted = { id: randomUUID(), from, to, amount: 10 };

    const answer = await whileDeadlocked(1, wanted);

    expect(answer.status).toBe(201);
    expect(await entriesOf(wanted.id)).toHaveLength(2);
    expect(notified.filter(({ id }) => id === wanted.id)).toHaveLength(1);
    expect(await requestOf(wanted.id)).toBe(answer.headers['x-request-id']);
  });

  it('asks the client to send it again if it happens each time, and it works then', async () => {
    const { from, to } = await twoAccounts(server, { balance: 1000 });
    const wanted = { id: randomUUID(), from, to, amount: 10 };

    const { status, headers, body } = await whileDeadlocked(3, wanted);

    expect({ status, headers, body }).toMatchObject({
      status: 503,
      headers: { 'retry-after': '1' },
      body: { detail: expect.stringContaining('again') },
    });
    expect(headers).not.toHaveProperty('location');
    expect(await entriesOf(wanted.id)).toEqual([]);
    await transfer(server, wanted).expect(201);
  });
});

describe('when a transfer is sent again', () => {
  it('moves once when both requests come at the same time', async () => {
    const { from, to } = await twoAccounts(server, { balance: 1000 });
    const wanted = { id: randomUUID(), from, to, amount: 10 };

    const responses = await Promise.all(Array.from({ length: 6 }, () => transfer(server, wanted)));

    expect(responses.map(({ status }) => status).sort()).toEqual([200, 200, 200, 200, 200, 201]);
    expect(await balanceOf(database.admin, to)).toBe('10');
  });
});

describe('when a transfer is made', () => {
  it('shows in an account either with its entry and in the balance, or not at all', async () => {
    const { from, to } = await twoAccounts(server, { balance: 1000 });
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
});

describe('when the connection is lost during COMMIT', () => {
  it('says that the outcome is unknown, and sending it again settles it', async () => {
    const { from, to } = await twoAccounts(server, { balance: 1000 });
    const wanted = { id: randomUUID(), from, to, amount: 10 };

    const response = await whileLocked(from, async () => {
      const answer = send(transfer(server, wanted));
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
    await transfer(server, wanted).expect(201);
    await transfer(server, wanted).expect(200);
    expect(await balanceOf(database.admin, to)).toBe('10');
  });
});

/** The answer to a transfer that finds itself in a deadlock, and gives in, so many times. */
async function whileDeadlocked(times: number, wanted: { id: string; from: string; to: string; amount: number }): Promise<request.Response> {
  const [first, last] = [wanted.from, wanted.to].sort() as [string, string];
  const lock = (trx: Knex, id: string) => trx('accounts').where({ id }).forNoKeyUpdate();
  const other = await database.admin.transaction();
  try {
    await other.raw("set local deadlock_timeout = '1min'"); // So that the transfer is the one that gives in.
    await lock(other, last);
    const answer = send(transfer(server, wanted));
    for (let i = 0; i < times; i++) {
      await eventually(async () => expect(await waitingCommits()).toHaveLength(1));
      // It gets the lock when the transfer has given in; and gives it back, for the next attempt.
      await other.transaction((savepoint) => lock(savepoint, first).then(() => savepoint.rollback())).catch(() => {});
    }
    await other.rollback();
    return await answer;
  } finally {
    if (!other.isCompleted()) await other.rollback();
  }
}

async function requestOf(transferId: string): Promise<string> {
  const [id] = await database.admin('transfers').where('id', transferId).pluck('request_id');
  return String(id);
}

async function entriesOf(transferId: string): Promise<unknown[]> {
  return database.admin('entries').where('transfer_id', transferId);
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
