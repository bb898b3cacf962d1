/**
 * Every error code of the package with the HTTP status that its error carries.
 * This table is the one place that lists them; docs/errors.md is checked against it.
 */
export const errorStatuses = {
  ERR_TRANSACTION_ABORTED: 500,
  ERR_COMMIT_UNKNOWN: 500,
  ERR_SESSION_UNAVAILABLE: 503,
  ERR_SESSION_TIMEOUT: 503,
  ERR_SESSION_CLOSED: 500,
  ERR_SESSION_OPEN_LONG: 500,
  ERR_SESSION_MISSING: 500,
  ERR_SESSION_OPTIONS: 500,
  ERR_SAVEPOINT_OPEN: 500,
  ERR_ROLLBACK_ONLY: 500,
  ERR_NO_TRANSACTION: 500,
  ERR_NOT_RETRYABLE: 500,
  ERR_TRANSACTION_CONTROL: 500,
  ERR_NOT_A_LOGIN_SESSION: 500,
  ERR_SESSION_DESTROY: 500,
  ERR_TEST_NOT_RUNNING: 500,
  ERR_TEST_BLOCKED: 500,
  ERR_TEST_LEFT_OPEN: 500,
  ERR_TEST_UNSUPPORTED: 500,
} as const;

/** The `code` of a {@link SessionError}. `docs/errors.md` says of each what happened, and what to do. */
export type SessionErrorCode = keyof typeof errorStatuses;

/**
 * The base of every error of this package.
 *
 * 1. `code` is stable and never translated; switch on it, not on the message.
 * 2. `status` is the HTTP status that Express's default error handler answers with.
 * 3. `cause`, where there is one, is the error that came first: the driver's, or the application's.
 * 4. No message holds SQL text or values, so it may be logged; `cause` may hold both.
 *
 * @example
 * const answerUnknown: ErrorRequestHandler = (error, req, res, next) => {
 *   if (error instanceof SessionError && error.code === 'ERR_COMMIT_UNKNOWN') {
 *     res.status(error.status).json({ error: 'It is not known whether your change was stored.' });
 *   } else next(error);
 * };
 */
export class SessionError extends Error {
  /** The name of the class. */
  override readonly name: string = 'SessionError';
  /** What happened: stable, for code to switch on. */
  readonly code: SessionErrorCode;
  /** The HTTP status that belongs to `code`. */
  readonly status: number;

  constructor(code: SessionErrorCode, message: string, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
    this.code = code;
    this.status = errorStatuses[code];
  }
}

/**
 * `ERR_TRANSACTION_ABORTED`: a statement failed, its error was swallowed, and a commit was asked for.
 *
 * 1. PostgreSQL answers such a COMMIT with ROLLBACK: nothing was stored.
 * 2. `cause` is the first swallowed error.
 *
 * @example
 * if (error instanceof TransactionAbortedError) console.error('swallowed:', error.cause);
 */
export class TransactionAbortedError extends SessionError {
  override readonly name = 'TransactionAbortedError';
  constructor(cause: unknown) {
    super(
      'ERR_TRANSACTION_ABORTED',
      'The transaction was rolled back at COMMIT, because one of its statements had failed and the error was not passed on. ' +
        'Rethrow it, run the statement in a savepoint (session.transaction()), or call session.setRollbackOnly() if the response is right as it is. ' +
        'See `cause` for the first error.',
      cause,
    );
  }
}

/**
 * `ERR_COMMIT_UNKNOWN`: the connection was lost while COMMIT was under way.
 *
 * 1. The transaction may have been committed or not; only the database can tell.
 * 2. It must not be repeated blindly: {@link isRetryable} is false.
 *
 * @example
 * if (error instanceof CommitUnknownError && !(await isStored(order))) await store(order);
 */
export class CommitUnknownError extends SessionError {
  override readonly name = 'CommitUnknownError';
  constructor(cause: unknown) {
    super(
      'ERR_COMMIT_UNKNOWN',
      'The connection was lost while COMMIT was in flight: the transaction may have been committed or not. ' +
        'Look in the database before you repeat it.',
      cause,
    );
  }
}

/**
 * `ERR_SESSION_UNAVAILABLE`: no connection could be had within `acquireTimeout`, or no transaction begun on it; or the application is
 * shutting down (`drain()`).
 *
 * 1. Nothing was stored.
 * 2. `cause` is the error of the pool or of the driver, if there was one.
 *
 * @example
 * if (error instanceof SessionUnavailableError) res.set('Retry-After', '5');
 */
export class SessionUnavailableError extends SessionError {
  override readonly name = 'SessionUnavailableError';
  constructor(
    cause: unknown,
    message = 'No database session could be opened: the database is down, its pool is full, or BEGIN failed. See `cause`.',
  ) {
    super('ERR_SESSION_UNAVAILABLE', message, cause);
  }
}

/**
 * `ERR_SESSION_TIMEOUT`: the transaction was open for longer than `transactionTimeout`, and has been rolled back.
 *
 * @example
 * if (error instanceof SessionTimeoutError) log.warn({ url: req.originalUrl }, 'slow');
 */
export class SessionTimeoutError extends SessionError {
  override readonly name = 'SessionTimeoutError';
  constructor(transactionTimeout: number) {
    super(
      'ERR_SESSION_TIMEOUT',
      `The transaction was open for longer than ${transactionTimeout} ms (transactionTimeout), and has been rolled back. ` +
        'Do what is slow before the first statement, or raise the limit for this route.',
    );
  }
}

/**
 * `ERR_SESSION_OPEN_LONG`: a transaction is open for longer than `warnAfter`, and holds its connection. Nothing has failed: only `onError`
 * and the channel `long` are told of it, once.
 *
 * 1. `stack` is where the session was first used.
 * 2. `statement` is SQL, without values: it is not in the message.
 *
 * @example
 * sessionMiddleware(knex, {
 *   warnAfter: 1_000,
 *   onError(error) {
 *     if (error instanceof SessionOpenLongError) log.warn({ route: error.route, ms: error.ms, statement: error.statement });
 *     else log.error(error);
 *   },
 * });
 */
export class SessionOpenLongError extends SessionError {
  override readonly name = 'SessionOpenLongError';

  /**
   * @param route the method and the path of the route; undefined in `withSession()`
   * @param ms for how long the transaction was open
   * @param statement the text of its last statement
   */
  constructor(
    warnAfter: number,
    readonly route: string | undefined,
    readonly ms: number,
    readonly statement: string | undefined,
    firstUse: string | undefined,
  ) {
    super(
      'ERR_SESSION_OPEN_LONG',
      `${route ?? 'withSession()'} has had its transaction open for ${Math.round(ms)} ms, with a connection of the pool (warnAfter: ${warnAfter}). ` +
        'Do what is slow before the first statement, or end the session before it. See `statement` for the last one.',
    );
    this.stack = `${this.name}: ${this.message}\n    Last statement: ${statement ?? 'none yet'}${firstUse ? `\n${firstUse}` : ''}`;
  }
}

/**
 * `ERR_SESSION_CLOSED`: a statement, or a call that needs an open session, came after the session's end. Its message says what ended it.
 *
 * @example
 * if (error instanceof SessionClosedError && req.session.signal.aborted) return; // the client has gone
 */
export class SessionClosedError extends SessionError {
  override readonly name = 'SessionClosedError';
  /** @param because what ended the session, and what to do: completes "The session is closed: ...". */
  constructor(because: string, cause?: unknown) {
    super('ERR_SESSION_CLOSED', `The session is closed: ${because}`, cause);
  }
}
