import express, { type ErrorRequestHandler, type Express, type NextFunction, type Request, type Response } from 'express';
import { type SessionOptions, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import { type TestDatabase as Kit, type TestDatabaseOptions, testDatabase } from 'express-knex-session/testing';
import type { Knex } from 'knex';
import request, { type Response as Answer } from 'supertest';
import { createDatabase, type TestDatabase } from './database';
import { eventually, poolUsage } from './pool';

export type { Answer };
export type Handler = (req: Request, res: Response, next: NextFunction) => unknown;

/** An application as users write it, made with a Knex of the kit; and the same on a plain Knex, as in production. */
export class TestedApp {
  /** A database of its own, to look at from outside of the tests' transaction: `own.admin`. */
  own!: TestDatabase;
  /** What the kit was given. */
  original!: Knex;
  kit!: Kit;

  get knex(): Knex {
    return this.kit.knex;
  }

  /** An application with one handler, on every path. */
  app(handler: Handler, options?: SessionOptions): Express {
    return appOn(this.knex, handler, options);
  }

  /** Serves one request by a handler. */
  async answer(handler: Handler, options?: SessionOptions): Promise<Answer> {
    return await request(this.app(handler, options)).get('/');
  }

  /** Serves requests one after the other, with the kit, and without it before. What they store without it is taken away. */
  async answers(handlers: Handler[], options?: SessionOptions): Promise<{ tested: Answer[]; inProduction: Answer[] }> {
    const answers: Record<'tested' | 'inProduction', Answer[]> = { tested: [], inProduction: [] };
    for (const handler of handlers) answers.inProduction.push(await request(appOn(this.original, handler, options)).get('/'));
    await this.own.admin.raw('TRUNCATE items, notes');
    for (const handler of handlers) answers.tested.push(await this.answer(handler, options));
    return answers;
  }

  /** The names that the test sees. */
  names(knex = this.knex): Promise<string[]> {
    return knex('items').orderBy('name').pluck('name');
  }

  /** The names that all the others see. */
  stored(): Promise<string[]> {
    return this.names(this.own.admin);
  }

  /** The statements of this database that the server runs and that begin so. */
  async running(sql: string): Promise<string[]> {
    const here = this.own.admin('pg_stat_activity').whereRaw('datname = current_database()');
    return here.where({ state: 'active' }).whereLike('query', `${sql}%`).pluck('query');
  }

  async isOnServer(sql: string): Promise<void> {
    await eventually(async () => expect(await this.running(sql)).toHaveLength(1));
  }

  /** Nothing was stored, and no connection is held: not by the kit's Knex, and not by the one that it was given. */
  async expectNothingLeft(): Promise<void> {
    const stored = [...(await this.stored()), ...(await this.own.admin('notes').pluck('text'))];
    expect(stored).toEqual([]);
    await eventually(() => {
      for (const knex of [this.knex, this.original]) expect(poolUsage(knex)).toMatchObject({ used: 0, pendingAcquires: 0 });
    });
  }
}

export interface Use extends TestDatabaseOptions {
  /** Whether each test begins and rolls back by itself. */
  byHand?: boolean;
  pool?: Knex.PoolConfig;
}

/** A tested app for the tests of a file, or of a `describe`. */
export function useTestedApp({ byHand = false, pool = { min: 0, max: 10 }, ...options }: Use = {}): TestedApp {
  const tested = new TestedApp();
  beforeAll(async () => {
    tested.own = await createDatabase();
    await tested.own.admin.raw(SCHEMA);
    tested.original = tested.own.knex({ pool, log: { warn() {} } });
    tested.kit = testDatabase(tested.original, options);
  });
  if (!byHand) {
    beforeEach(() => tested.kit.begin());
    afterEach(() => tested.kit.rollback());
  }
  afterEach(() => tested.expectNothingLeft());
  afterAll(async () => {
    await tested.knex.destroy();
    await tested.own.drop();
  });
  return tested;
}

/** What an answer says, less what differs from one to the next. */
export function comparable({ status, body, headers: { date: _, ...headers } }: Answer): unknown {
  return { status, body, headers };
}

/** What the app calls its `knex`. */
export function knexOf(req: Request): Knex {
  return req.app.locals['knex'];
}

/** The error of a promise that rejects, to look at. */
export async function caught(promise: PromiseLike<unknown>): Promise<any> {
  return promise.then(
    () => 'no error',
    (error: unknown) => error,
  );
}

export interface Gate {
  open(): void;
  opened: Promise<void>;
}

export function gate(): Gate {
  let open = (): void => {};
  const opened = new Promise<void>((resolve) => {
    open = resolve;
  });
  return { open: () => open(), opened };
}

function appOn(knex: Knex, handler: Handler, options?: SessionOptions): Express {
  const app = express();
  app.locals['knex'] = knex;
  app.use(express.json());
  app.use(sessionMiddleware(knex, options));
  app.use(async (req, res, next) => {
    await handler(req, res, next);
  });
  app.use(sessionErrorHandler(), answerError);
  return app;
}

const answerError: ErrorRequestHandler = (error, _req, res, _next) => {
  const { status = 500, code, constraint, message, cause } = error;
  res.status(status).json({ code, constraint, message, cause: cause?.code });
};

/** 'bad' is refused at once (23514); `name` must be unique at COMMIT, `place` after each statement, until it is deferred (23505). */
const SCHEMA = `
  CREATE TABLE items (
    id serial PRIMARY KEY,
    name text NOT NULL CONSTRAINT not_bad CHECK (name <> 'bad'),
    place integer,
    CONSTRAINT late UNIQUE (name) DEFERRABLE INITIALLY DEFERRED,
    CONSTRAINT prompt UNIQUE (place) DEFERRABLE INITIALLY IMMEDIATE
  );
  CREATE TABLE notes (text text NOT NULL);
  CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO notes VALUES (format('%s by %s', NEW.name, current_user)); RETURN NULL; END $$;
  CREATE CONSTRAINT TRIGGER noted AFTER INSERT ON items DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.name LIKE 'noted%') EXECUTE FUNCTION note();
`;
