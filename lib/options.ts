import type { Request, Response } from 'express';
import type { IsolationLevel, Settings } from './beginning';

/** When the session is settled: see {@link SessionOptions.commitAt}. */
export type CommitAt = 'head' | 'end' | 'finish';

/** What becomes of the work when its client has gone: see {@link SessionOptions.onDisconnect}. */
export type OnDisconnect = 'rollback' | 'finish';

/** How long a session waits for what, in ms. */
export interface Limits {
  readonly acquireTimeout: number;
  readonly transactionTimeout: number;
  readonly settleTimeout: number;
  readonly warnAfter: number;
}

/** A value for all requests, or a function that gives it for one; asked at the session's first statement. */
export type PerRequest<T> = T | ((req: Request) => T);

/** The options of {@link sessionMiddleware}, and of {@link sessionOptions} for one route. A wrong name or value is a `TypeError` at construction. */
export interface SessionOptions {
  /**
   * The property of the request where the session is attached.
   *
   * @default 'session'
   * @example sessionMiddleware(knex, { property: 'db' }) // next to express-session, which owns req.session
   */
  property?: string | undefined;

  /**
   * When the transaction is committed or rolled back.
   *
   * 1. `'head'`: before the first byte of the response leaves. A COMMIT that fails becomes a proper error response.
   * 2. `'end'`: bytes flow while the transaction is open; what completes the response is withheld until COMMIT succeeded.
   *    If it fails after bytes have left, the connection is reset.
   * 3. `'finish'`: after the response has been sent. A failing COMMIT goes to `onError`; **the client has been told otherwise.**
   *
   * @default 'head'
   * @example sessionMiddleware(knex, { commitAt: (req) => (req.path.startsWith('/export') ? 'end' : 'head') })
   */
  commitAt?: PerRequest<CommitAt> | undefined;

  /**
   * Whether the response that is about to leave means COMMIT (`true`) or ROLLBACK (`false`).
   * Asked once, when the status is fixed. It must answer at once; if it throws, the session is rolled back and the error goes to the error handlers.
   *
   * @default (req, res) => res.statusCode < 400
   * @example sessionMiddleware(knex, { shouldCommit: (req, res) => res.statusCode < 400 || res.statusCode === 422 })
   */
  shouldCommit?: ((req: Request, res: Response) => boolean) | undefined;

  /**
   * The isolation level of the transaction.
   *
   * @default the server's (`default_transaction_isolation`)
   * @example sessionMiddleware(knex, { isolationLevel: 'repeatable read' })
   */
  isolationLevel?: PerRequest<IsolationLevel | undefined> | undefined;

  /**
   * Whether the transaction may only read: a write fails with 25006. Below SERIALIZABLE its response does not wait for the answer to COMMIT,
   * since nothing can be lost by it.
   *
   * @default the server's (`default_transaction_read_only`)
   * @example sessionMiddleware(knex, { readOnly: (req) => req.method === 'GET' })
   */
  readOnly?: PerRequest<boolean | undefined> | undefined;

  /**
   * Whether a transaction that is SERIALIZABLE and read-only waits for a moment in which it cannot fail.
   *
   * @default the server's (`default_transaction_deferrable`)
   * @example sessionOptions({ isolationLevel: 'serializable', readOnly: true, deferrable: true })
   */
  deferrable?: PerRequest<boolean | undefined> | undefined;

  /**
   * PostgreSQL's run-time settings, for the transaction only (`set_config(name, value, true)`): what row-level security reads.
   *
   * 1. They go with BEGIN: no statement ever runs without them.
   * 2. A function is asked at the first statement. Nothing in place of a value (null, undefined), or an empty name, is `ERR_SESSION_OPTIONS`.
   *
   * @default none
   * @example sessionMiddleware(knex, { settings: (req) => ({ 'app.tenant': req.user.tenant }) })
   */
  settings?: PerRequest<Settings> | undefined;

  /**
   * The role that the statements run as, for the transaction only (`SET LOCAL ROLE`). It goes with the settings.
   *
   * @default the one that has connected
   * @example sessionMiddleware(knex, { role: (req) => (req.user ? 'app_user' : 'app_anonymous') })
   */
  role?: PerRequest<string> | undefined;

  /**
   * Whether the statements run in a transaction. Without, each commits by itself, on a connection that it takes for itself: for single reads,
   * and to switch the package off by a flag. With `settings` or `role` it is `ERR_SESSION_OPTIONS`.
   *
   * @default true
   * @example app.get('/accounts/:id', sessionOptions({ transaction: false }), showAccount)
   */
  transaction?: PerRequest<boolean> | undefined;

  /**
   * What a client that disconnects before the response ends means for the work: it is cancelled and rolled back, or the handler goes on
   * and its response decides as always.
   *
   * @default 'rollback'
   * @example sessionMiddleware(knex, { onDisconnect: (req) => (req.method === 'GET' ? 'rollback' : 'finish') })
   */
  onDisconnect?: PerRequest<OnDisconnect> | undefined;

  /**
   * How long the first statement may wait for a connection, in ms. Past it: `ERR_SESSION_UNAVAILABLE` (503).
   *
   * @default 5000
   * @example sessionMiddleware(knex, { acquireTimeout: 1_000 })
   */
  acquireTimeout?: PerRequest<number> | undefined;

  /**
   * How long a transaction may stay open, in ms, from the moment it has a connection; 0 is no limit. A stream of rows that moves extends it.
   * Past it the running statement is cancelled, the work is rolled back, and the client gets `ERR_SESSION_TIMEOUT` (503) if nothing was sent yet.
   *
   * @default 30000
   * @example sessionMiddleware(knex, { transactionTimeout: (req) => (req.path.startsWith('/reports') ? 300_000 : 10_000) })
   */
  transactionTimeout?: PerRequest<number> | undefined;

  /**
   * How long COMMIT or ROLLBACK may take, in ms. Past it the connection is destroyed; a COMMIT without an answer is `ERR_COMMIT_UNKNOWN`.
   *
   * @default 10000
   * @example sessionMiddleware(knex, { settleTimeout: 5_000 })
   */
  settleTimeout?: PerRequest<number> | undefined;

  /**
   * After how many ms `onError` is told, once, of a transaction that is still open ({@link SessionOpenLongError}); 0 is never. It goes on.
   * Its route, the text of its last statement, and where the session was first used are in the error. Each request then costs a stack trace.
   *
   * @default 0
   * @example sessionMiddleware(knex, { warnAfter: process.env.NODE_ENV === 'production' ? 0 : 1_000 })
   */
  warnAfter?: PerRequest<number> | undefined;

  /**
   * Whether the session is kept in AsyncLocalStorage, for `currentSession()` and `scopedSession()`. A value only.
   *
   * @default false
   * @example sessionMiddleware(knex, { context: true })
   */
  context?: boolean | undefined;

  /**
   * Receives the errors that no one else can: a ROLLBACK that failed (its `cause` is the error that it was for), a COMMIT that failed
   * after the response was under way.
   *
   * @default the logger of the Knex instance
   * @example sessionMiddleware(knex, { onError: (error, req) => log.error({ error, url: req?.originalUrl }) })
   */
  onError?: ((error: unknown, req?: Request) => void) | undefined;
}
