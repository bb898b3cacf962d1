import express, { type NextFunction, type Request, type Response } from 'express';
import { type SessionOptions, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import createKnex, { type Knex } from 'knex';
import { type Client, Pool } from 'pg';
import { createDatabase, type TestDatabase } from './database';
import { type Answer, get, type Listening, listen, type RequestOptions } from './http';
import { eventually, poolUsage } from './pool';
import { startWireProxy, type WireMessage, type WireProxy } from './wire-proxy';

export type Handler = (req: Request, res: Response, next: NextFunction) => unknown;

/** For Knex, or a pool of pg's own for it; a function is given the URL of the database through the proxy. */
type BenchConfig = Knex.Config | ((url: string) => Knex.Config | Pool);

/** What a client of the app reads of an error. */
export interface ErrorBody {
  code?: string;
  message: string;
}

/**
 * A service on real sockets: HTTP client, Express 5, the session, Knex, a proxy on the wire, PostgreSQL.
 *
 * Its table `items` refuses the name 'bad' at once (23514), and a name that is there already at COMMIT (23505).
 */
export class Bench {
  database!: TestDatabase;
  proxy!: WireProxy;
  knex!: Knex;
  /** What came to the app's error handler, in order. */
  errors: any[] = [];
  /** What came to `onError`, in order. */
  reported: any[] = [];

  /** Called where the app handles an error. */
  onErrorHandler: (() => void) | undefined;
  /** What Knex logged, in order. */
  logged: string[] = [];

  private readonly log = {
    warn: (message: string) => this.logged.push(message),
    error: (message: string) => this.logged.push(message),
  };
  private nativePool: Pool | undefined;
  private http!: Listening;
  private readonly handlers: Handler[] = [];

  async start(config: BenchConfig, options: SessionOptions): Promise<void> {
    this.database = await createDatabase();
    await this.database.admin.raw(`
      CREATE TABLE items (
        id serial PRIMARY KEY,
        name text CHECK (name <> 'bad') UNIQUE DEFERRABLE INITIALLY DEFERRED
      )`);
    this.proxy = await startWireProxy(this.database.url);
    const { url } = this.proxy;
    const given = typeof config === 'function' ? config(url) : config;
    if (given instanceof Pool) this.nativePool = given;
    this.knex = this.nativePool
      ? createKnex({ client: 'pg', connectionPool: this.nativePool, log: this.log })
      : this.database.knex({ connection: url, pool: { min: 0, max: 4 }, log: this.log, ...given });
    this.http = await listen(this.app(options));
  }

  async stop(): Promise<void> {
    await this.http.close();
    await this.nativePool?.end();
    try {
      await this.database.drop();
    } finally {
      await this.proxy.close();
    }
  }

  /** Nothing is left of the test before; one connection is open and idle. */
  async reset(): Promise<void> {
    this.proxy.onFrontend(undefined);
    this.proxy.onBackend(undefined);
    await this.database.admin.raw('TRUNCATE items RESTART IDENTITY');
    await this.knex.raw('SELECT 1');
    this.errors = [];
    this.reported = [];
    this.logged = [];
    this.onErrorHandler = undefined;
    this.proxy.reset();
  }

  /** Makes a URL whose requests this handler serves. */
  route(handler: Handler): string {
    return `${this.http.url}/${this.handlers.push(handler) - 1}`;
  }

  /** Serves one request by this handler. */
  answer(handler: Handler, options?: RequestOptions): Promise<Answer> {
    // One that hangs must not take the tests after it with it.
    return get(this.route(handler), { signal: AbortSignal.timeout(5_000), ...options });
  }

  /** The names in the table, in the order in which they were inserted. */
  async stored(): Promise<string[]> {
    return this.database.admin('items').orderBy('id').pluck('name');
  }

  /** The driver's connection that a session holds at the moment. */
  held(): Client {
    const { used } = this.knex.client.pool as { used: { resource: Client }[] };
    expect(used).toHaveLength(1);
    return (used[0] as { resource: Client }).resource;
  }

  /** Ends the backend of the connection that a session holds, and waits until the driver knows. */
  async kill(): Promise<void> {
    const connection = this.held();
    const known = ended(connection);
    await this.terminate(connection);
    await known;
  }

  /** Breaks the network under the connection that a session holds, and waits until the driver and the server know. */
  async cut(): Promise<void> {
    const known = ended(this.held());
    this.proxy.cut();
    await known;
    await this.terminateAll();
  }

  /** Ends the backend of a connection that is in a transaction, and waits until the server has done so. */
  async terminate(connection: Client): Promise<void> {
    await this.database.admin.raw('SELECT pg_terminate_backend(?, 5000)', [await this.database.backendOf(connection)]);
  }

  /** Waits until the pool is at rest; a connection that is stuck fails this test, but none after it. */
  async rest(): Promise<void> {
    try {
      await atRest(this.knex);
    } catch (error) {
      await this.terminateAll();
      await atRest(this.knex).catch(() => {});
      throw error;
    }
  }

  private async terminateAll(): Promise<void> {
    await this.database.admin.raw(`
      SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`);
  }

  private app(options: SessionOptions): express.Express {
    const app = express();
    app.use(sessionMiddleware(this.knex, { onError: (error) => this.reported.push(error), ...options }));
    app.get('/:index', (req, res, next) => this.handlers[Number(req.params.index)]?.(req, res, next));
    app.use(sessionErrorHandler());
    app.use((error: any, _req: Request, res: Response, _next: NextFunction) => {
      this.errors.push(error);
      this.onErrorHandler?.();
      const body: ErrorBody = { code: error.code, message: error.message };
      res.status(error.status ?? 500).json(body);
    });
    return app;
  }
}

/** A bench for the tests of a file or of a `describe`; after each test the pool must be at rest. */
export function useBench(config: BenchConfig = {}, options: SessionOptions = {}): Bench {
  const bench = new Bench();
  beforeAll(() => bench.start(config, options));
  beforeEach(() => bench.reset());
  afterEach(() => bench.rest());
  afterAll(() => bench.stop());
  return bench;
}

/** `once` of Node would reject with the error that comes before. */
export function ended(connection: Client): Promise<void> {
  return new Promise((resolve) => connection.once('end', resolve));
}

/** Waits until no connection is in use and nobody waits for one. */
export async function atRest(knex: Knex): Promise<void> {
  // A pool of pg's own has no such counts.
  if (knex.client.pool.numUsed === undefined) return;
  await eventually(() => expect(poolUsage(knex)).toMatchObject({ used: 0, pendingAcquires: 0 }));
}

/** What clients sent, as one line: `P(BEGIN;) B E P(select 1) B D E S Q(COMMIT;)`. */
export function sent(proxy: WireProxy): string {
  return proxy.frontend.map(({ type, text }) => (text ? `${type}(${text})` : type)).join(' ');
}

/** A hook that waits for a message of this text, to act between the client's sending it and the server's receiving it. */
export function isSql(message: WireMessage, sql: string): boolean {
  return (message.type === 'Q' || message.type === 'P') && message.text === sql;
}

/** Spoils a command on its way, so that the server refuses it: BEGIN becomes BEGIX. The length stays. */
export function spoil(message: WireMessage): void {
  const start = message.bytes.indexOf(message.text);
  message.bytes.write('X', start + message.text.replace(';', '').length - 1);
}

export function deferred<T = void>(): { promise: Promise<T>; resolve: (value: T) => void } {
  let resolve!: (value: T) => void;
  const promise = new Promise<T>((settle) => {
    resolve = settle;
  });
  return { promise, resolve };
}
