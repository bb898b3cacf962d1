import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { createServer, get, type IncomingMessage, type Server } from 'node:http';
import type { AddressInfo, Socket } from 'node:net';
import type { Knex } from 'knex';
import request from 'supertest';
import { createApp } from '../example-app/app';
import { configFor } from '../example-app/database';
import { migrate } from '../example-app/migrations';
import { createDatabase, type TestDatabase } from './support/database';
import { addEntries, externalAccount } from './support/example-app-requests';
import { eventually, poolUsage } from './support/pool';

/*
 * Without 'express-knex-session/testing', whose connections are not those of the app's pool: who has a connection, for how long, and what
 * becomes of it.
 */
let database: TestDatabase;
const logged: unknown[] = [];

beforeAll(async () => {
  database = await createDatabase();
  await migrate(database.admin);
});

beforeEach(() => {
  logged.length = 0;
});

afterAll(() => database.drop());

describe('when the reader of a statement is slow', () => {
  const memo = 'x'.repeat(2_500); // Longer than the API takes them: few rows are enough.
  let id: string;

  beforeAll(async () => {
    await withPool({ max: 1 }, async (_pool, app) => {
      id = await externalAccount(app);
    });
    await addEntries(database.admin, id, 10_000, memo);
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

describe('when the input is not valid', () => {
  it('takes no connection', async () => {
    await withPool({ max: 1 }, async (pool, app) => {
      await request(app).post('/transfers').send({}).expect(400);
      expect(poolUsage(pool)).toEqual({ used: 0, free: 0, pendingAcquires: 0 });
    });
  });
});

function serve(pool: Knex): Server {
  return createServer(createApp(pool, { logError: (error) => logged.push(error) }).app).listen(0);
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

/** What the sessions on this database do. */
async function activity(condition: string): Promise<{ pid: number }[]> {
  const { rows } = await database.admin.raw(`select pid from pg_stat_activity where datname = current_database() and ${condition}`);
  return rows;
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
