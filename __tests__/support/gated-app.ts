import type { Socket } from 'node:net';
import { Duplex } from 'node:stream';
import type { ErrorRequestHandler, Express, RequestHandler } from 'express';
import { type SessionOptions, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { createDatabase, type TestDatabase } from './database';
import { type Listening, listen } from './http';
import { express5Flavour, type Flavour, type Handler } from './ledger';
import { eventually, poolUsage } from './pool';
import { startWireProxy, type WireProxy } from './wire-proxy';

export type { Handler };

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

export interface GatedServer extends Listening {
  /** The server's ends of its connections, in the order in which they came. */
  sockets: readonly Socket[];
}

export interface GatedApps {
  database: TestDatabase;
  /** The pool of the gated apps; its connections go through the proxy. */
  knex: Knex;
  proxy: WireProxy;
  /** What `onError` was told. */
  reported: unknown[];
  /** Runs a handler behind the gate, on every path. */
  gated(handler: Handler, options?: AppOptions): Promise<GatedServer>;
  /** The app alone, for a server of another kind. */
  app(handler: Handler, options?: AppOptions): Express;
  /** The same without the package: `req.session` is a Knex instance, whose statements commit by themselves. */
  plain(handler: Handler, options?: AppOptions): Promise<GatedServer>;
  /** Lets the next COMMIT (or what is asked for) wait until the test lets it go: "before COMMIT" is a state, not a race. */
  hold(statement?: 'COMMIT' | 'ROLLBACK'): Hold;
  names(): Promise<string[]>;
  /** Empties the table, lets go what is held, closes the servers. */
  reset(): Promise<void>;
  close(): Promise<void>;
}

/** The name of an entry that a deferred constraint refuses: at COMMIT, or at once if a statement commits by itself. */
export const REFUSED = 'refused';

/** Apps for the tests of a file, or of a `describe`. After each: nothing refused was stored, and no connection is held. */
export function useGatedApps(flavour?: Flavour): GatedApps {
  const apps = {} as GatedApps;
  beforeAll(async () => {
    Object.assign(apps, await gatedApps(flavour));
  });
  afterEach(async () => {
    const names = await apps.names();
    await apps.reset();
    expect(names).not.toContain(REFUSED);
    await eventually(() => expect(poolUsage(apps.knex)).toMatchObject({ used: 0, pendingAcquires: 0 }));
  });
  afterAll(() => apps.close());
  return apps;
}

/** A table `entries (name)`, whose deferred constraint refuses {@link REFUSED} at COMMIT. */
export async function gatedApps({ express, route }: Flavour = express5Flavour): Promise<GatedApps> {
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
  const servers: GatedServer[] = [];
  const reported: unknown[] = [];
  let release = (): void => {};

  const compose = (mount: (app: Express) => void, handler: Handler, options: AppOptions): Express => {
    const app = express();
    options.before?.(app);
    mount(app);
    options.after?.(app);
    app.use(route((req, res, next) => handler(req, res, next)) as RequestHandler);
    app.use(sessionErrorHandler());
    for (const errorHandler of options.errorHandlers ?? []) app.use(errorHandler);
    return app;
  };
  const gatedApp = (handler: Handler, { before, after, errorHandlers, ...options }: AppOptions = {}): Express => {
    const middleware = sessionMiddleware(knex, { onError: (error) => reported.push(error), ...options });
    const mounts = { ...(before && { before }), ...(after && { after }), ...(errorHandlers && { errorHandlers }) };
    return compose((app) => app.use(middleware), handler, mounts);
  };
  const serve = async (app: Express): Promise<GatedServer> => {
    const listening = await listen(app);
    const sockets: Socket[] = [];
    listening.server.on('connection', (socket) => sockets.push(socket));
    const server = { ...listening, sockets };
    servers.push(server);
    return server;
  };
  const reset = async (): Promise<void> => {
    proxy.onFrontend(undefined);
    release();
    for (const server of servers.splice(0)) {
      // Not `socket.destroy()`: the gate may still hold that back, and a test that fails must not hang.
      for (const socket of server.sockets) Duplex.prototype.destroy.call(socket);
      await server.close();
    }
  };

  return {
    database,
    knex,
    proxy,
    reported,
    gated: (handler, options) => serve(gatedApp(handler, options)),
    app: gatedApp,
    plain(handler, options = {}) {
      const attach: Handler = (req, _res, next) => {
        (req as unknown as { session: Knex }).session = plainKnex;
        next();
      };
      return serve(compose((app) => app.use(attach), handler, options));
    },
    hold(statement = 'COMMIT') {
      const reached = deferred();
      const released = deferred();
      release = released.resolve;
      proxy.onFrontend(({ text }) => {
        if (!text.startsWith(statement)) return undefined;
        reached.resolve();
        return released.promise;
      });
      return {
        reached: reached.promise,
        release() {
          proxy.onFrontend(undefined);
          released.resolve();
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

export interface Deferred<T> {
  promise: Promise<T>;
  resolve(value: T): void;
}

export function deferred<T = void>(): Deferred<T> {
  let resolve!: (value: T) => void;
  const promise = new Promise<T>((fulfil) => {
    resolve = fulfil;
  });
  return { promise, resolve };
}

/** Inserts what COMMIT will refuse, then answers as if nothing were wrong. */
export function refusedAfter(answer: Handler): Handler {
  return async (req, res, next) => {
    await req.session('entries').insert({ name: REFUSED });
    return answer(req, res, next);
  };
}
