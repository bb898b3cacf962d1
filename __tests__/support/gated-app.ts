import { once } from 'node:events';
import type { Socket } from 'node:net';
import express, { type ErrorRequestHandler, type Express, type NextFunction, type Request, type Response } from 'express';
import { type SessionOptions, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { createDatabase, type TestDatabase } from './database';
import { type Listening, listen, RawClient } from './http';
import { startWireProxy, type WireProxy } from './wire-proxy';

export type Handler = (req: Request, res: Response, next: NextFunction) => unknown;

export interface AppOptions extends SessionOptions {
  /** Mounts what stands before the session. */
  before?: (app: Express) => void;
  /** Mounts what stands between the session and the handler. */
  after?: (app: Express) => void;
  /** The app's error handlers; without any, Express answers. */
  errorHandlers?: ErrorRequestHandler[];
}

export interface Hold {
  /** Resolves when the statement has come to the server's door; it waits there. */
  reached: Promise<void>;
  release(): void;
}

export interface GatedApps {
  database: TestDatabase;
  /** The pool of the gated apps; its connections go through the proxy. */
  knex: Knex;
  proxy: WireProxy;
  /** What `onError` was told. */
  reported: unknown[];
  /** The handler behind the gate, on every path. */
  gated(handler: Handler, options?: AppOptions): Promise<Listening>;
  /** The same without the package: `req.session` is a Knex instance, whose statements commit by themselves. */
  plain(handler: Handler, options?: AppOptions): Promise<Listening>;
  /** Lets the next COMMIT (or what is asked for) wait until the test lets it go: "before COMMIT" is a state, not a race. */
  hold(statement?: 'COMMIT' | 'ROLLBACK'): Hold;
  names(): Promise<string[]>;
  /** Empties the table, lets go what is held, closes the servers. */
  reset(): Promise<void>;
  close(): Promise<void>;
}

/** The name of an entry that a deferred constraint refuses: at COMMIT, or at once if a statement commits by itself. */
export const REFUSED = 'refused';

/** A table `entries (name)`, whose deferred constraint refuses {@link REFUSED} at COMMIT. */
export async function gatedApps(): Promise<GatedApps> {
  const database = await createDatabase();
  await database.admin.raw(`
    CREATE TABLE entries (id serial PRIMARY KEY, name text NOT NULL);
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
      BEGIN RAISE EXCEPTION 'entry refused' USING ERRCODE = 'check_violation'; END $$;
    CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON entries DEFERRABLE INITIALLY DEFERRED
      FOR EACH ROW WHEN (NEW.name = '${REFUSED}') EXECUTE FUNCTION refuse();
  `);
  const proxy = await startWireProxy(database.url);
  const knex = database.knex({ connection: proxy.url });
  const plainKnex = database.knex();
  const servers: Listening[] = [];
  const reported: unknown[] = [];
  let release = (): void => {};

  const serve = async (mount: (app: Express) => void, handler: Handler, options: AppOptions): Promise<Listening> => {
    const app = express();
    options.before?.(app);
    mount(app);
    options.after?.(app);
    app.use((req, res, next) => handler(req, res, next));
    app.use(sessionErrorHandler());
    for (const errorHandler of options.errorHandlers ?? []) app.use(errorHandler);
    const listening = await listen(app);
    servers.push(listening);
    return listening;
  };
  const reset = async (): Promise<void> => {
    proxy.onFrontend(undefined);
    release();
    await Promise.all(servers.splice(0).map((server) => server.close()));
  };

  return {
    database,
    knex,
    proxy,
    reported,
    gated(handler, { before, after, errorHandlers, ...options } = {}) {
      const middleware = sessionMiddleware(knex, { onError: (error) => reported.push(error), ...options });
      const mounts = { ...(before && { before }), ...(after && { after }), ...(errorHandlers && { errorHandlers }) };
      return serve((app) => app.use(middleware), handler, mounts);
    },
    plain(handler, options = {}) {
      const attach: Handler = (req, _res, next) => {
        (req as unknown as { session: Knex }).session = plainKnex;
        next();
      };
      return serve((app) => app.use(attach), handler, options);
    },
    hold(statement = 'COMMIT') {
      let arrive = (): void => {};
      const reached = new Promise<void>((resolve) => {
        arrive = resolve;
      });
      const released = new Promise<void>((resolve) => {
        release = resolve;
      });
      proxy.onFrontend(({ text }) => {
        if (!text.startsWith(statement)) return undefined;
        arrive();
        return released;
      });
      const letGo = release;
      return {
        reached,
        release() {
          proxy.onFrontend(undefined);
          letGo();
        },
      };
    },
    names: () => database.admin('entries').orderBy('id').pluck('name'),
    async reset() {
      await reset();
      reported.length = 0;
      await database.admin('entries').del();
    },
    async close() {
      await reset();
      await proxy.close();
      await database.drop();
    },
  };
}
