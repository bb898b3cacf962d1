import express, { type ErrorRequestHandler, type Express, type NextFunction, type Request, type Response } from 'express';
import { type SessionOptions, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import express4 from 'express4';
import type { Knex } from 'knex';
import { createDatabase, type TestDatabase } from './database';
import { type Listening, listen } from './http';
import { eventually, poolUsage } from './pool';
import { startWireProxy, type WireProxy } from './wire-proxy';

export type Handler = (req: Request, res: Response, next: NextFunction) => unknown;

export interface Flavour {
  version: string;
  express: typeof express;
  /** An async handler, as users of this version write it: Express 4 drops the promise, so that they must pass on its rejection. */
  route(handler: Handler): Handler;
}

export const express5Flavour: Flavour = { version: 'Express 5', express, route: (handler) => handler };
export const express4Flavour: Flavour = {
  version: 'Express 4',
  express: express4 as unknown as typeof express,
  route: (handler) => async (req, res, next) => {
    try {
      await handler(req, res, next);
    } catch (error) {
      next(error);
    }
  },
};

/** For `describe.each(flavours)('on $version', ...)`. */
export const flavours = [express5Flavour, express4Flavour];

/** What the deferred constraint trigger does with a note at COMMIT. */
export type AtCommit =
  /** Raises check_violation (23514). */
  | 'fail'
  /** Raises serialization_failure (40001). */
  | 'conflict'
  /** Waits as long as {@link Ledger.holdCommits} holds. */
  | 'wait'
  /** Kills its own backend. */
  | 'die';

export interface ServeOptions extends SessionOptions {
  knex?: Knex;
  /** In place of sessionErrorHandler() and {@link answerErrors}. */
  errorHandlers?: ErrorRequestHandler[];
}

export interface Served extends Listening {
  /** What reached the application's error handler. */
  errors: any[];
}

export interface HeldCommits {
  /** Settles when that many COMMITs wait. */
  waiting(count?: number): Promise<void>;
  release(): Promise<void>;
}

export interface Ledger {
  readonly database: TestDatabase;
  /** The pool under test. */
  readonly knex: Knex;
  /** The application of most tests: middleware, routes, sessionErrorHandler, an error handler that answers with the code. */
  serve(flavour: Flavour, routes: (app: Express) => void, options?: ServeOptions): Promise<Served>;
  /** The same, where one handler answers every request. */
  serving(flavour: Flavour): (handler: Handler, options?: ServeOptions) => Promise<Served>;
  /** Listens until the end of the test. */
  listen(app: Express): Promise<Listening>;
  /** The ids in the database, as everybody sees them. */
  stored(): Promise<string[]>;
  holdCommits(): Promise<HeldCommits>;
  /** Ends the backend of the one transaction that is open, and waits until it is gone. */
  killBackend(): Promise<void>;
  /** A pool of its own until the end of the test. Knex's complaints about lost connections are not printed. */
  pool(config?: Knex.Config): Knex;
  /** A pool of its own behind a wire proxy, until the end of the test. */
  throughProxy(config?: Knex.Config): Promise<{ knex: Knex; proxy: WireProxy }>;
  /** Waits until no connection is in use, and none is waited for; no backend is in a transaction. */
  isClean(pool?: Knex): Promise<void>;
}

/** A database with one table, whose COMMIT can be made to fail; emptied after each test, which must leave no connection in use. */
export function useLedger(poolSize = 5): Ledger {
  let database: TestDatabase;
  let knex: Knex;
  const servers: Listening[] = [];
  const pools: Knex[] = [];
  const proxies: WireProxy[] = [];
  const held: HeldCommits[] = [];

  const isClean = (pool = knex): Promise<void> =>
    eventually(async () => {
      expect(poolUsage(pool)).toMatchObject({ used: 0, pendingAcquires: 0 });
      expect(await openTransactions(database.admin)).toEqual([]);
    });

  beforeAll(async () => {
    database = await createDatabase();
    await database.admin.raw(schema);
    knex = database.knex({ pool: { min: 0, max: poolSize }, log: quiet });
  });
  afterEach(async () => {
    for (const { release } of held.splice(0)) await release();
    for (const server of servers.splice(0)) await server.close();
    for (const proxy of proxies) proxy.onFrontend(undefined);
    const leaks: unknown[] = [];
    const noteLeak = (error: unknown) => void leaks.push(error);
    for (const pool of pools.splice(0)) {
      await isClean(pool).catch(noteLeak);
      // A pool waits for a leaked connection for ever.
      const closed = pool.destroy();
      if (leaks.length === 0) await closed;
    }
    for (const proxy of proxies.splice(0)) await proxy.close();
    await isClean().catch(noteLeak);
    await database.admin('notes').del();
    if (leaks.length > 0) throw leaks[0];
  });
  afterAll(() => database.drop());

  const ledger: Ledger = {
    get database() {
      return database;
    },
    get knex() {
      return knex;
    },
    async serve({ express }, routes, { knex: pool = knex, errorHandlers, ...options } = {}) {
      const errors: unknown[] = [];
      const app = express();
      app.use(sessionMiddleware(pool, options));
      routes(app);
      for (const handler of errorHandlers ?? [sessionErrorHandler(), answerErrors(errors)]) app.use(handler);
      return Object.assign(await ledger.listen(app), { errors });
    },
    serving: (flavour) => (handler, options) => ledger.serve(flavour, (app) => app.use(flavour.route(handler)), options),
    async listen(app) {
      const listening = await listen(app);
      servers.push(listening);
      return listening;
    },
    stored: () => database.admin('notes').orderBy('id').pluck('id'),
    async holdCommits() {
      const holder = await database.admin.transaction();
      await holder.raw(`SELECT pg_advisory_xact_lock(${HELD_COMMITS})`);
      const holding: HeldCommits = {
        waiting: (count = 1) =>
          eventually(async () => {
            const waiting = await database
              .admin('pg_locks')
              .where({ locktype: 'advisory', objid: HELD_COMMITS, granted: false })
              .whereRaw('database = (SELECT oid FROM pg_database WHERE datname = current_database())');
            expect(waiting).toHaveLength(count);
          }),
        async release() {
          if (!holder.isCompleted()) await holder.commit();
        },
      };
      held.push(holding);
      return holding;
    },
    async killBackend() {
      const { rows } = await database.admin.raw(
        "SELECT pg_terminate_backend(pid, 5000) AS killed FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database() AND xact_start IS NOT NULL AND backend_type = 'client backend' AND query NOT LIKE '%pg_advisory_xact_lock%'",
      );
      expect(rows).toEqual([{ killed: true }]);
    },
    pool(config) {
      const pool = database.knex({ log: quiet, ...config });
      pools.push(pool);
      return pool;
    },
    async throughProxy(config) {
      const proxy = await startWireProxy(database.url);
      proxies.push(proxy);
      return { proxy, knex: ledger.pool({ connection: proxy.url, ...config }) };
    },
    isClean,
  };
  return ledger;
}

/** Writes a note in the request's session. */
export function insert(req: Request, id: string, atCommit?: AtCommit): Knex.QueryBuilder {
  return req.session('notes').insert({ id, at_commit: atCommit ?? null });
}

/** An error handler that answers as many do: the error's status, and its code as JSON. */
export function answerErrors(errors: unknown[]): ErrorRequestHandler {
  return (error, _req, res, next) => {
    errors.push(error);
    if (res.headersSent) return next(error);
    res.status(error.status ?? 500).json({ code: error.code, message: error.message });
  };
}

/** What began and ended transactions on the wire. */
export function controlOf(proxy: WireProxy): string[] {
  return proxy.sql().filter((sql) => /^(BEGIN|COMMIT|ROLLBACK)/.test(sql));
}

export function openTransactions(admin: Knex): Promise<unknown[]> {
  return admin('pg_stat_activity')
    .whereRaw("datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'")
    .whereNotNull('xact_start')
    .select('pid', 'state', 'query');
}

const quiet: Knex.Logger = {
  error: () => {},
  warn: (message) => {
    if (!/^(Acquire c|C)onnection error/i.test(message)) console.warn(message);
  },
};

const HELD_COMMITS = 1;

const schema = `
  CREATE TABLE notes (id text PRIMARY KEY, at_commit text);

  CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS $$
  BEGIN
    CASE NEW.at_commit
      WHEN 'fail' THEN RAISE EXCEPTION 'note % is refused at COMMIT', NEW.id USING ERRCODE = '23514';
      WHEN 'conflict' THEN RAISE EXCEPTION 'could not serialize' USING ERRCODE = '40001';
      WHEN 'wait' THEN PERFORM pg_advisory_xact_lock(${HELD_COMMITS});
      WHEN 'die' THEN PERFORM pg_terminate_backend(pg_backend_pid());
    END CASE;
    RETURN NULL;
  END $$;

  CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON notes DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.at_commit IS NOT NULL) EXECUTE FUNCTION at_commit();
`;
