import { randomBytes } from 'node:crypto';
import express, { type Express } from 'express';
import { sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import { testDatabase } from 'express-knex-session/testing';
import createKnex, { type Knex } from 'knex';
import request from 'supertest';
import { median, summary } from './statistics';

/** How an application's tests are kept apart. The others are compared with the first. */
const ways = {
  session: { name: 'testDatabase(): begin, rollback', tests: 20, prepare: inTransactions },
  truncate: { name: 'TRUNCATE and seed', tests: 20, prepare: truncating },
  recreate: { name: 'new database from a template', tests: 5, prepare: recreating },
} as const;
type Name = keyof typeof ways;
const names = Object.keys(ways) as Name[];

interface Way {
  /** One test, with all that keeps it apart from the next one. */
  test(): Promise<void>;
  close(): Promise<void>;
}

/** A small application tested with supertest in three ways: how long one test takes. */
export async function measureTesting(url: string, { rounds, title }: { rounds: number; title: string }): Promise<string> {
  const server = new Server(url);
  const prepared = new Map<Name, Way>();
  const times = new Map<Name, number[]>(names.map((name) => [name, []]));
  try {
    for (const name of names) prepared.set(name, await ways[name].prepare(server));
    // Warm-up: the first rounds are those of the compiler.
    for (let round = -2; round < rounds; round++) {
      // Each goes first in its turn.
      for (const i of names.keys()) {
        const name = names[(i + Math.max(round, 0)) % names.length] as Name;
        const time = await timeOf(prepared.get(name) as Way, ways[name].tests);
        if (round >= 0) times.get(name)?.push(time);
      }
    }
  } finally {
    for (const way of prepared.values()) await way.close();
    await server.close();
  }
  return report(times, title);
}

async function timeOf(way: Way, tests: number): Promise<number> {
  const milliseconds: number[] = [];
  for (let i = 0; i < tests; i++) {
    const start = performance.now();
    await way.test();
    milliseconds.push(performance.now() - start);
  }
  return median(milliseconds);
}

function report(times: Map<Name, number[]>, title: string): string {
  const base = times.get('session') as number[];
  const lines = names.map((name) => {
    const own = times.get(name) as number[];
    const ratios = own.map((value, i) => value / (base[i] as number));
    return `  ${ways[name].name.padEnd(32)} ${summary(own, 1).padStart(24)} ms   ${summary(ratios, 1).padStart(20)} times`;
  });
  return [`One test of an app, ${title}: median (and middle half) of ${base.length} rounds`, ...lines].join('\n');
}

// The three ways.

async function inTransactions(server: Server): Promise<Way> {
  const knex = await server.create();
  await knex.raw(SEED);
  const database = testDatabase(knex);
  const app = createApp(database.knex);
  return {
    test: database.inTransaction(() => transferAndLook(app, database.knex)),
    async close() {
      await database.knex.destroy();
      await knex.destroy();
    },
  };
}

async function truncating(server: Server): Promise<Way> {
  const knex = await server.create();
  const app = createApp(knex);
  return {
    async test() {
      // In one round trip, and one transaction.
      await knex.raw(`TRUNCATE customers, accounts, limits, transfers, entries RESTART IDENTITY; ${SEED}`);
      await transferAndLook(app, knex);
    },
    close: () => knex.destroy(),
  };
}

async function recreating(server: Server): Promise<Way> {
  const template = await server.create();
  await template.raw(SEED);
  await template.destroy();
  let knex = await server.create({ template });
  return {
    async test() {
      knex = await server.recreate(knex, template);
      await transferAndLook(createApp(knex), knex);
      await knex.destroy();
    },
    close: () => knex.destroy(),
  };
}

// What is tested, and the test.

function createApp(knex: Knex): Express {
  const app = express();
  app.use(express.json());
  app.use(sessionMiddleware(knex));
  app.post('/transfers', async (req, res) => {
    const { from, to, amount } = req.body;
    const [transfer] = await req.session('transfers').insert({ note: 'rent' }).returning('id');
    await req.session('entries').insert([
      { transfer: transfer.id, account: from, amount: -amount },
      { transfer: transfer.id, account: to, amount },
    ]);
    res.status(201).json(transfer);
  });
  app.get('/accounts/:account/balance', async (req, res) => {
    const { account } = req.params;
    res.json(await req.session('entries').where({ account }).sum('amount as balance').first());
  });
  app.use(sessionErrorHandler());
  return app;
}

async function transferAndLook(app: Express, knex: Knex): Promise<void> {
  const { body: transfer } = await request(app).post('/transfers').send({ from: 1, to: 2, amount: 25 }).expect(201);
  await request(app).get('/accounts/2/balance').expect(200, { balance: '125' });
  const entries = await knex('entries').where({ transfer: transfer.id });
  if (entries.length !== 2) throw new Error(`The test has found ${entries.length} entries.`);
}

const SCHEMA = `
  CREATE TABLE customers (id serial PRIMARY KEY, name text NOT NULL UNIQUE);
  CREATE TABLE accounts (
    id serial PRIMARY KEY,
    customer int NOT NULL REFERENCES customers,
    currency text NOT NULL CHECK (length(currency) = 3),
    UNIQUE (customer, currency)
  );
  CREATE TABLE limits (account int PRIMARY KEY REFERENCES accounts, amount int NOT NULL CHECK (amount > 0));
  CREATE TABLE transfers (id serial PRIMARY KEY, note text NOT NULL, made_at timestamptz NOT NULL DEFAULT now());
  CREATE INDEX ON transfers (made_at);
  CREATE TABLE entries (
    id serial PRIMARY KEY,
    transfer int NOT NULL REFERENCES transfers,
    account int NOT NULL REFERENCES accounts DEFERRABLE INITIALLY DEFERRED,
    amount int NOT NULL CHECK (amount <> 0)
  );
  CREATE INDEX ON entries (transfer);
  CREATE INDEX ON entries (account)`;

/** 21 rows. */
const SEED = `
  INSERT INTO customers (name) VALUES ('Ada'), ('Blaise'), ('Charles'), ('Dorothy'), ('Emmy');
  INSERT INTO accounts (customer, currency) VALUES (1, 'EUR'), (2, 'EUR'), (3, 'EUR'), (4, 'EUR'), (5, 'EUR'), (1, 'USD');
  INSERT INTO limits VALUES (1, 1000), (2, 1000), (3, 500), (6, 200);
  INSERT INTO transfers (note) VALUES ('opening'), ('opening');
  INSERT INTO entries (transfer, account, amount) VALUES (1, 1, -100), (1, 2, 100), (2, 3, -50), (2, 4, 50)`;

/** The databases of one measurement, on a server that is there. */
class Server {
  private readonly admin: Knex;
  private readonly databases = new Set<string>();

  constructor(private readonly url: string) {
    this.admin = createKnex({ client: 'pg', connection: url });
  }

  /** A new database, with the tables or as a copy of another one. */
  async create({ template }: { template?: Knex } = {}): Promise<Knex> {
    const name = `bench_${randomBytes(8).toString('hex')}`;
    await this.admin.raw('CREATE DATABASE ?? TEMPLATE ??', [name, template ? nameOf(template) : 'template0']);
    this.databases.add(name);
    const knex = this.connect(name);
    if (!template) await knex.raw(SCHEMA);
    return knex;
  }

  async recreate(knex: Knex, template: Knex): Promise<Knex> {
    const name = nameOf(knex);
    await this.admin.raw('DROP DATABASE ??', [name]);
    await this.admin.raw('CREATE DATABASE ?? TEMPLATE ??', [name, nameOf(template)]);
    return this.connect(name);
  }

  async close(): Promise<void> {
    for (const name of this.databases) await this.admin.raw('DROP DATABASE ?? WITH (FORCE)', [name]);
    await this.admin.destroy();
  }

  private connect(name: string): Knex {
    const url = new URL(this.url);
    url.pathname = `/${name}`;
    return createKnex({ client: 'pg', connection: url.href, pool: { min: 0, max: 10 } });
  }
}

function nameOf(knex: Knex): string {
  return knex.client.database();
}
