import { randomUUID } from 'node:crypto';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { SessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import request from 'supertest';
import { createApp } from '../example-app/app';
import { configFor } from '../example-app/database';
import { type SessionMetrics, sessionMetrics } from '../example-app/metrics';
import { migrate } from '../example-app/migrations';
import { createDatabase, type TestDatabase } from './support/database';
import { externalAccount, send, transfer, twoAccounts } from './support/example-app-requests';
import { eventually, poolUsage } from './support/pool';
import { scrape, startingWith } from './support/scrape';

/* What Prometheus is told by the ledger. Every way to end a session: recipes-metrics.test.ts. */
let database: TestDatabase;
let pool: Knex;
let server: Server;
let url: string;
const measuring: SessionMetrics[] = [];

beforeAll(async () => {
  database = await createDatabase();
  await migrate(database.admin);
});

beforeEach(() => {
  pool = database.knex({ ...configFor(database.url), pool: { min: 0, max: 1 } });
  serve(pool);
});

afterEach(() => {
  server.closeAllConnections();
  server.close();
  for (const { stop } of measuring.splice(0)) stop();
});

afterAll(() => database.drop());

describe('when requests have ended', () => {
  it('tells how, and for how long they held their connections', async () => {
    const { from, to } = await twoAccounts(server, { balance: 100 }); // Three accounts, one transfer.
    const before = await settled();
    const id = randomUUID();

    const startedAt = performance.now();
    await transfer(server, { from, to, amount: 50 }).expect(201);
    await request(server).get(`/accounts/${to}`).expect(200);
    await transfer(server, { from, to, amount: 51 }).expect(409); // Refused at COMMIT.
    await request(server).get(`/transfers/${id}`).expect(404);
    await request(server).post('/transfers').send({}).expect(400); // No statement was run.
    const tookSeconds = (performance.now() - startedAt) / 1_000;

    expect(before).toEqual({ [settledAs('committed', 'response')]: 4 });
    await eventually(async () =>
      expect(await settled()).toEqual({
        [settledAs('committed', 'response')]: 6,
        [settledAs('rolled back', 'error')]: 2,
      }),
    );
    const series = await scrape(url);
    expect(startingWith('db_session_held_seconds_count', series)).toEqual({
      'db_session_held_seconds_count{outcome="committed"}': 6,
      'db_session_held_seconds_count{outcome="rolled back"}': 2,
    });
    const heldSeconds = series['db_session_held_seconds_sum{outcome="rolled back"}'];
    expect(heldSeconds).toBeGreaterThan(0);
    expect(heldSeconds).toBeLessThan(tookSeconds);
    const { body } = await request(server).get('/health').expect(200);
    expect(body.sessions).toEqual({ open: 0, waiting: 0, committed: 6, rolledBack: 2, unknown: 0 });
  });
});

describe('while the only connection is taken', () => {
  it('tells who holds it, and who waits', async () => {
    const { from, to } = await twoAccounts(server, { balance: 1 });
    const holder = await database.admin.transaction();
    await holder.raw('lock table entries');

    const waiting = [send(transfer(server, { from, to, amount: 1 })), send(request(server).get(`/accounts/${to}`))];

    const gauges = { db_sessions_open: 1, db_sessions_waiting: 1, db_pool_connections_used: 1, db_pool_connections_max: 1 };
    await eventually(async () => expect(await scrape(url)).toMatchObject(gauges));
    await holder.rollback();
    expect((await Promise.all(waiting)).map(({ status }) => status)).toEqual([201, 200]);
    const none = { db_sessions_open: 0, db_sessions_waiting: 0, db_pool_connections_used: 0, db_pool_connections_max: 1 };
    await eventually(async () => expect(await scrape(url)).toMatchObject(none));
  });

  it('takes none itself', async () => {
    const taken = await pool.transaction();
    await taken.raw('select 1');
    expect(await scrape(url)).toMatchObject({ db_sessions_open: 0, db_sessions_waiting: 0, db_pool_connections_used: 1 });
    expect(poolUsage(pool)).toMatchObject({ used: 1, pendingAcquires: 0 });
    await taken.rollback();
  });
});

describe('with another ledger in the same process', () => {
  it('counts its own', async () => {
    await externalAccount(server);
    await externalAccount(server);
    const [first, firstUrl] = [server, url];
    serve(database.knex({ ...configFor(database.url), pool: { min: 0, max: 2 } }));
    await externalAccount(server);

    expect([await settled(firstUrl), await settled()]).toEqual([
      { [settledAs('committed', 'response')]: 2 },
      { [settledAs('committed', 'response')]: 1 },
    ]);
    first.close();
  });
});

const settledAs = (outcome: string, reason: string) => `db_sessions_settled_total{outcome="${outcome}",reason="${reason}"}`;

async function settled(of = url): Promise<Record<string, number>> {
  return startingWith('db_sessions_settled_total', await scrape(of));
}

function serve(knex: Knex): void {
  const metrics = (sessions: SessionMiddleware) => {
    const metrics = sessionMetrics(knex, sessions);
    measuring.push(metrics);
    return metrics.handler;
  };
  server = createServer(createApp(knex, { logError: () => {}, metrics }).app).listen(0);
  url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}
