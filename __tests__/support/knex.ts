import express from 'express';
import { getSession, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { createDatabase, type TestDatabase } from './database';
import { get, listen } from './http';
import { poolUsage } from './pool';

/** Something that one does with a `Knex.Transaction`; it says what it saw. */
export interface Use {
  name: string;
  fails?: boolean;
  run: (trx: Knex.Transaction, knex: Knex) => unknown;
}

/** A way to get a transaction: resolves with the use's result after COMMIT, rejects with its error after ROLLBACK. */
export type Way = (knex: Knex, work: (trx: Knex.Transaction) => unknown) => Promise<unknown>;

export const plainly: Way = (knex, work) => knex.transaction(async (trx) => work(trx));

export const inSession: Way = (knex, work) => withSession(knex, async (session) => work(session));

export const inRequest: Way = async (knex, work) => {
  let outcome: PromiseSettledResult<unknown> | undefined;
  const app = express()
    .use(sessionMiddleware(knex))
    .get('/', async (req, res) => {
      [outcome] = await Promise.allSettled([Promise.resolve(getSession(req)).then(work)]);
      if (outcome?.status === 'rejected') throw outcome.reason;
      res.end();
    })
    .use(sessionErrorHandler(), answerError);
  const server = await listen(app);
  const answer = await get(server.url);
  await server.close();
  if (outcome?.status === 'rejected') throw outcome.reason;
  if (answer.status !== 200) throw new Error(`The response was ${answer.status} ${answer.body}.`);
  return outcome?.value;
};

/** Ways to have an outer transaction; each rejects, and rolls back, if the work does. */
export type Outer = <T>(knex: Knex, work: (outer: Knex.Transaction) => Promise<T>) => Promise<T>;
export const outers: [string, Outer][] = [
  ['a Knex.Transaction', (knex, work) => knex.transaction(work)],
  ['a savepoint of a Knex.Transaction', (knex, work) => knex.transaction((trx) => trx.transaction(work))],
  ['a session', (knex, work) => withSession(knex, work)],
  ['a savepoint of a session', (knex, work) => withSession(knex, (session) => session.transaction(work))],
  ['a session in a Knex.Transaction', (knex, work) => knex.transaction((trx) => withSession(trx, work))],
];

/** Sends what went wrong, so that a test can see it from the outside. */
export const answerError: express.ErrorRequestHandler = (error, _req, res, _next) => {
  res.status(error.status ?? 500).json({ code: error.code, message: error.message, cause: error.cause?.message });
};

/** What is stored when a test begins. */
export const UNCHANGED = ['Ann', 'Bob', 'Cid'];

export const insert = (trx: Knex, name: string) => trx('people').insert({ name });

/** The error of a promise that rejects, to look at. */
export const caught = async (promise: PromiseLike<unknown>): Promise<any> =>
  promise.then(
    () => 'no error',
    (error: unknown) => error,
  );

/** A database with people, Ann (10), Bob (20) and Cid (30), and no payments; the same before every test. */
export class Ledger {
  knex!: Knex;
  private database!: TestDatabase;

  /** Makes the database for the tests of a file. */
  static forTests(config: Knex.Config = {}): Ledger {
    const ledger = new Ledger();
    beforeAll(async () => {
      ledger.database = await createDatabase();
      ledger.knex = ledger.database.knex(config);
    });
    beforeEach(() => ledger.reset());
    afterAll(() => ledger.database.drop());
    return ledger;
  }

  get admin(): Knex {
    return this.database.admin;
  }

  get url(): string {
    return this.database.url;
  }

  /** One more pool, with a configuration of its own. */
  connect(config: Knex.Config = {}): Knex {
    return this.database.knex(config);
  }

  async reset(): Promise<void> {
    await this.admin.raw(SCHEMA);
  }

  async names(): Promise<string[]> {
    return this.admin('people').orderBy('name').pluck('name');
  }

  /** All that is stored, table by table, and what is left of the pool. */
  async state(knex = this.knex): Promise<unknown> {
    const tables = await this.admin('pg_tables').where({ schemaname: 'public' }).orderBy('tablename').pluck('tablename');
    const rows: Record<string, unknown> = {};
    for (const table of tables) rows[table] = await this.admin(table).orderByRaw('1');
    return { rows, used: poolUsage(knex).used };
  }

  /** What a use sees, what listeners on the root Knex hear of it, and what it leaves behind. */
  async outcomeOf(way: Way, run: Use['run'], knex = this.knex): Promise<unknown> {
    await this.reset();
    const statements: unknown[] = [];
    const listener = ({ sql, bindings }: { sql: string; bindings: unknown }) => statements.push([sql, bindings ?? []]);
    knex.on('query', listener);
    const [result] = await Promise.allSettled([way(knex, (trx) => run(trx, knex))]);
    knex.off('query', listener);
    // A session that runs no statement sends no BEGIN: see knex-differences.test.ts.
    const isUnused = statements.length === 2 && way === plainly;
    return comparable({ result, statements: isUnused ? [] : statements, state: await this.state(knex) });
  }

  /** Runs the uses in a plain `knex.transaction()`, and expects the same in sessions: results, errors, the SQL, and what is stored. */
  comparesWithKnex(uses: readonly Use[], getKnex = () => this.knex): void {
    test.each(uses)('$name', async ({ run, fails = false }) => {
      const plain = await this.outcomeOf(plainly, run, getKnex());
      // A use that fails by mistake would compare well.
      expect(plain).toMatchObject({ result: { status: fails ? 'rejected' : 'fulfilled' } });
      expect({ inSession: await this.outcomeOf(inSession, run, getKnex()) }).toEqual({ inSession: plain });
      expect({ inRequest: await this.outcomeOf(inRequest, run, getKnex()) }).toEqual({ inRequest: plain });
    });
  }
}

/** A value in a form that two runs can be compared in: errors with all that they say, ids of transactions in order of appearance. */
export function comparable(value: unknown): unknown {
  const ids = new Map<string, string>();
  const renamed = (text: string): string =>
    text.replace(/\b(?:trx|session|__knexUid)\d+\b/g, (id) => {
      if (!ids.has(id)) ids.set(id, `id${ids.size + 1}`);
      return ids.get(id) as string;
    });
  const visit = (item: unknown): unknown => {
    if (typeof item === 'string') return renamed(item);
    if (typeof item === 'function') return `a function ${item.name}`;
    if (Array.isArray(item)) return item.map(visit);
    if (item instanceof Error) {
      const { name, message } = item;
      const { code, constraint, detail, cause } = item as Error & Record<string, unknown>;
      return { error: name, message: renamed(message), code, constraint, detail: visit(detail), cause: visit(cause) };
    }
    if (typeof item === 'object' && item !== null) {
      const type = item.constructor;
      if (type?.name === 'Date') return 'a time';
      // pg's Result holds the types of its columns by their numbers; those of tables differ from run to run.
      if (type?.name === 'Result') {
        const { command, rowCount, rows } = item as Record<string, unknown>;
        return { command, rowCount, rows: visit(rows) };
      }
      // Models of Objection say themselves what is to be shown of them.
      if ('toJSON' in item && typeof item.toJSON === 'function') return visit(item.toJSON());
      if (type === Object || type === undefined) {
        return Object.fromEntries(Object.entries(item).map(([key, part]) => [key, visit(part)]));
      }
    }
    return item;
  };
  return visit(value);
}

const SCHEMA = `
  DROP SCHEMA IF EXISTS public CASCADE;
  CREATE SCHEMA public;
  CREATE TABLE people (
    id serial PRIMARY KEY,
    name text NOT NULL CONSTRAINT people_name_unique UNIQUE,
    balance integer NOT NULL DEFAULT 0,
    data jsonb
  );
  CREATE TABLE payments (
    id serial PRIMARY KEY,
    person_id integer NOT NULL REFERENCES people,
    amount integer NOT NULL CONSTRAINT payments_amount_not_zero CHECK (amount <> 0)
  );
  INSERT INTO people (name, balance, data)
  VALUES ('Ann', 10, '{"tags": ["a", "b"], "age": 41}'), ('Bob', 20, '{"tags": []}'), ('Cid', 30, NULL);`;
