import express, { type Request, type RequestHandler } from 'express';
import { sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import { testDatabase } from 'express-knex-session/testing';
import type { Knex } from 'knex';
import { createDatabase, type TestDatabase } from './support/database';
import { get, type Listening, listen, RawClient } from './support/http';
import { answerError } from './support/knex';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
jest.setTimeout(60_000);
const seed = Number(process.env['SEED'] ?? Date.now() % 1_000_000);
const TESTS = 10;
const REQUESTS = 200;

let database: TestDatabase;
beforeAll(async () => {
  database = await createDatabase();
  const columns = 'text text PRIMARY KEY, twin text REFERENCES notes DEFERRABLE INITIALLY DEFERRED';
  await database.admin.raw(`
    CREATE TABLE notes (${columns});
    CREATE SCHEMA production;
    SET LOCAL search_path = production;
    CREATE TABLE notes (${columns})`);
});
afterAll(() => database.drop());

interface Way {
  handler: (req: Request, id: string, res: express.Response, knex: Knex) => unknown;
  /** What of it stays, by the suffixes of its notes. */
  keeps: string[];
  leaves?: boolean;
}

const write = (db: Knex, text: string, twin?: string) => db('notes').insert({ text, twin: twin ?? null });

const ways: Record<string, Way> = {
  commit: {
    handler: async ({ session }, id, res) => {
      // A twin that comes later: right only because constraints are deferred.
      await write(session, `${id} a`, `${id} b`);
      await write(session, `${id} b`);
      res.status(201).json(await session('notes').where('text', 'like', `${id} %`).orderBy('text'));
    },
    keeps: ['a', 'b'],
  },
  'a status of 400': {
    handler: async ({ session }, id, res) => {
      await write(session, `${id} a`);
      res.sendStatus(400);
    },
    keeps: [],
  },
  'a throw': {
    handler: async ({ session }, id) => {
      await write(session, `${id} a`);
      throw Object.assign(new Error('mine'), { status: 418 });
    },
    keeps: [],
  },
  'an error that is swallowed': {
    handler: async ({ session }, id, res) => {
      await write(session, `${id} a`);
      await write(session, `${id} a`).catch(() => {});
      res.sendStatus(201);
    },
    keeps: [],
  },
  'a failure at COMMIT': {
    handler: async ({ session }, id, res) => {
      await write(session, `${id} a`, 'nobody');
      res.sendStatus(201);
    },
    keeps: [],
  },
  'constraints that are checked early': {
    handler: async ({ session }, id, res) => {
      await session.raw('SET CONSTRAINTS ALL IMMEDIATE');
      await write(session, `${id} a`);
      const refused = await session.transaction((inner) => write(inner, `${id} b`, 'nobody') as never).catch(({ code }) => code);
      res.status(201).json(refused);
    },
    keeps: ['a'],
  },
  savepoints: {
    handler: async ({ session }, id, res) => {
      await write(session, `${id} a`);
      const inner = session.transaction(async (trx) => [await write(trx, `${id} b`), await write(trx, `${id} a`)]);
      const code = await inner.catch((error) => error.code);
      await session.transaction(async (trx) => write(trx, `${id} c`));
      res.status(201).json(code);
    },
    keeps: ['a', 'c'],
  },
  'a client that leaves': {
    handler: async ({ session }, id, res) => {
      await write(session, `${id} a`);
      await session.raw(`SELECT pg_sleep(20) AS "${id}"`);
      res.sendStatus(201);
    },
    keeps: [],
    leaves: true,
  },
  setRollbackOnly: {
    handler: async ({ session }, id, res) => {
      await write(session, `${id} a`);
      session.setRollbackOnly();
      res.sendStatus(200);
    },
    keeps: [],
  },
  'a commit before the end': {
    handler: async ({ session }, id, res) => {
      await write(session, `${id} a`);
      await session.commit();
      res.status(500).json(session.outcome);
    },
    keeps: ['a'],
  },
  'settings of its own': {
    handler: async ({ session }, id, res) => {
      await session.raw("SELECT set_config('app.tenant', ?, true)", [id]);
      await session.raw('SET LOCAL ROLE pg_monitor; RESET ROLE');
      await write(session, `${id} a`);
      const { rows } = await session.raw("SELECT current_setting('app.tenant') AS tenant");
      res.status(201).json(rows);
    },
    keeps: ['a'],
  },
  'no settings left of another': {
    handler: async ({ session }, _id, res) => {
      const { rows } = await session.raw(
        "SELECT coalesce(current_setting('app.tenant', true), '') AS tenant, current_setting('role') AS role",
      );
      res.json(rows);
    },
    keeps: [],
  },
  'knex.transaction': {
    handler: async (_req, id, res, knex) => {
      await knex.transaction(async (trx) => write(trx, `${id} a`));
      const code = await knex
        .transaction(async (trx) => [await write(trx, `${id} b`), await write(trx, `${id} a`)])
        .catch((error) => error.code);
      res.status(201).json(code);
    },
    keeps: ['a'],
  },
  autocommit: {
    handler: async (_req, id, _res, knex) => {
      await write(knex, `${id} a`);
      await write(knex, `${id} b`, 'nobody').catch(() => {});
      throw new Error('mine');
    },
    keeps: ['a'],
  },
  'a stream': {
    handler: async ({ session }, id, res) => {
      await write(session, `${id} a`);
      const rows = [];
      for await (const { text } of session('notes').where('text', 'like', `${id} %`).stream()) rows.push(text);
      res.status(201).json(rows);
    },
    keeps: ['a'],
  },
};

function appOn(knex: Knex): express.Express {
  const app = express().use(sessionMiddleware(knex, { onError() {} }));
  for (const [i, { handler }] of Object.values(ways).entries()) {
    const route: RequestHandler = async (req, res) => void (await handler(req, String(req.query['id']), res, knex));
    app.get(`/${i}`, route);
  }
  return app.use(sessionErrorHandler(), answerError);
}

interface Asked {
  id: string;
  name: string;
}

/** Sends a request by its way; what the client was told. */
async function ask({ port, url }: Listening, { id, name }: Asked): Promise<unknown> {
  const path = `/${Object.keys(ways).indexOf(name)}?id=${id}`;
  if (!ways[name]?.leaves) {
    const { status, body } = await get(url + path);
    return { id, name, status, body };
  }
  const client = await RawClient.connect(port);
  client.get(path);
  const running = () => database.admin('pg_stat_activity').where({ state: 'active', query: `SELECT pg_sleep(20) AS "${id}"` });
  // It may wait for its turn behind the others.
  await eventually(async () => expect(await running()).toHaveLength(1));
  await client.reset();
  await eventually(async () => expect(await running()).toHaveLength(0));
  return { id, name, status: 'left', body: client.received };
}

const textsOf = (knex: Knex): Promise<string[]> => knex('notes').pluck('text');

// Scenarios 69 to 71.
describe(`when ${REQUESTS} requests are sent in ${TESTS} tests, at random, some at once`, () => {
  it(`answers and stores as without the kit, and each test leaves nothing behind (SEED=${seed})`, async () => {
    const original = database.knex({ pool: { min: 0, max: 8 } });
    const kit = testDatabase(original, { waitTimeout: 10_000 });
    const plain = database.knex({ pool: { min: 0, max: 8 }, searchPath: ['production'] });
    const [tested, production] = await Promise.all([listen(appOn(kit.knex)), listen(appOn(plain))]);
    const groups = planOf(randomFrom(seed));

    for (const test of groups) {
      await kit.begin();
      const expected: string[] = [];
      // Nothing of the tests before is there.
      expect(await textsOf(kit.knex)).toEqual([]);
      for (const group of test) {
        const told = await Promise.all(group.map((asked) => ask(tested, asked)));
        const inProduction = await Promise.all(group.map((asked) => ask(production, asked)));
        expect(told).toEqual(inProduction);
        for (const { id, name } of group) expected.push(...(ways[name]?.keeps ?? []).map((suffix) => `${id} ${suffix}`));
        // A client that has left is not waited for by anybody.
        await eventually(async () => expect((await textsOf(kit.knex)).sort()).toEqual([...expected].sort()));
      }
      await kit.rollback();
      expect((await textsOf(plain)).sort()).toEqual([...expected].sort());
      await plain('notes').del();
      expect(await textsOf(database.admin)).toEqual([]);
    }

    await Promise.all([tested, production].map((server) => server.close()));
    for (const knex of [kit.knex, original, plain]) expect(poolUsage(knex)).toMatchObject({ used: 0, pendingAcquires: 0 });
  });
});

/** Tests of groups of requests; those of a group are sent at once. */
function planOf(random: () => number): Asked[][][] {
  const names = Object.keys(ways);
  const asked = Array.from({ length: REQUESTS }, (_, i) => ({ id: `r${i}`, name: names[Math.floor(random() * names.length)] as string }));
  const tests: Asked[][][] = [];
  while (tests.length < TESTS) {
    const isLast = tests.length === TESTS - 1;
    const own = asked.splice(0, isLast ? asked.length : REQUESTS / TESTS);
    const groups: Asked[][] = [];
    while (own.length > 0) groups.push(own.splice(0, 1 + Math.floor(random() * 5)));
    tests.push(groups);
  }
  return tests;
}

/** mulberry32: the same numbers for the same seed. */
function randomFrom(start: number): () => number {
  let state = start;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4_294_967_296;
  };
}
