/**
 * What only PostgreSQL and its driver know. The driver's objects are described here as far as they are used, so that
 * no copy of `pg` is imported: the application's own is at work.
 */
export interface PgConnection {
  readonly __knexUid?: string;
  __knexTxId?: string | undefined;
  /** Knex's mark: its pool drops a connection that carries it (knex lib/client.js, `connectionIsDisposed`). */
  __knex__disposed?: unknown;
  /** pg's own field: true while no query is active. */
  readonly readyForQuery?: boolean;
  /** pg's option (>= 8.23): statements are sent before those in front are answered. */
  readonly pipeline?: boolean;
  /** The driver's connection to the wire; pg-native has none. */
  readonly connection?: Wire | undefined;
  // Where it has connected to, and how; the server's key for cancelling.
  readonly host: string;
  readonly port: number;
  readonly ssl?: unknown;
  readonly sslNegotiation?: string | undefined;
  readonly processID?: number | null | undefined;
  readonly secretKey?: number | null | undefined;
  query(query: unknown, callback?: QueryCallback): unknown;
  query(config: object | string, values: unknown, callback: QueryCallback): unknown;
  getTransactionStatus?(): string | null;
  end(): Promise<void>;
  on(event: 'error' | 'end' | 'drain', listener: (error?: unknown) => void): unknown;
  listenerCount(event: 'error'): number;
  removeListener(event: 'error' | 'end' | 'drain', listener: (error?: unknown) => void): unknown;
}

export type QueryCallback = (error: unknown, result?: { command: string }) => void;

export interface Wire {
  readonly stream: {
    readonly remoteAddress?: string;
    readonly writable: boolean;
    write(bytes: Uint8Array): unknown;
    cork(): void;
    uncork(): void;
    destroy(): void;
  };
  on(event: 'readyForQuery', listener: (message: { status: string }) => void): unknown;
  on(event: 'portalSuspended' | 'dataRow', listener: () => void): unknown;
  removeListener(event: 'portalSuspended' | 'dataRow', listener: () => void): unknown;
  parse(message: { text: string }): void;
  bind(message: object): void;
  execute(message: object): void;
  describe(message: object): void;
  sync(): void;
}

/** A statement as Knex has compiled it. */
export interface Statement {
  sql: string;
  bindings?: readonly unknown[];
  options?: object;
  method?: string;
}

/** Whether a statement was only a SELECT, as far as its text tells: a function that it calls may write. */
export function isRead({ sql }: Statement): boolean {
  return /^\s*(?:select|with)\b/i.test(sql) && !/\b(?:insert|update|delete|merge)\b/i.test(sql);
}

/** Whether a statement writes, as far as its text tells. */
export function isWrite({ sql }: Statement): boolean {
  return /^\s*(?:with\b.*?\b)?(?:insert|update|delete|merge)\b/is.test(sql);
}

/** Statuses of connections whose driver does not tell them (pg before 8.21), from its ReadyForQuery messages. */
const observedStatuses = new WeakMap<PgConnection, { status: string | null }>();

/** Must be called when a connection is taken, before the first statement: older drivers do not keep the status. */
export function observeStatus(connection: PgConnection): void {
  if (connection.getTransactionStatus !== undefined || observedStatuses.has(connection)) return;
  const observed: { status: string | null } = { status: null };
  observedStatuses.set(connection, observed);
  connection.connection?.on('readyForQuery', (message) => {
    observed.status = message.status;
  });
}

/**
 * The server's word on the transaction: `'I'` idle, `'T'` in a transaction, `'E'` in a failed one; null if it has not said.
 * Only true while {@link isReady}: right after an error it is the status of before.
 */
export function transactionStatus(connection: PgConnection): string | null {
  return connection.getTransactionStatus?.() ?? observedStatuses.get(connection)?.status ?? null;
}

export function isReady(connection: PgConnection): boolean {
  // pg-native has no such field: it calls back when it is ready.
  return connection.readyForQuery ?? connection.connection === undefined;
}

/** Waits until the server is ready for a query (`true`) or the connection has ended (`false`). */
export function whenReady(connection: PgConnection): Promise<boolean> {
  if (isReady(connection)) return Promise.resolve(true);
  return new Promise((resolve) => {
    const settle = (ready: boolean): void => {
      connection.removeListener('drain', onDrain);
      connection.removeListener('end', onEnd);
      connection.removeListener('error', onEnd);
      resolve(ready);
    };
    const onDrain = (): void => settle(true);
    const onEnd = (): void => settle(false);
    connection.on('drain', onDrain);
    connection.on('end', onEnd);
    connection.on('error', onEnd);
  });
}

/** Without waiting for anything: what a graceful end waits for may never come on a dead network. */
export function endAtOnce(connection: PgConnection): void {
  connection.end().catch(() => {});
  connection.connection?.stream.destroy();
}

/** Whether the server itself reported the error; anything else is a failure of the client or of the connection. */
export function isServerError(error: unknown): error is Error & { code: string } {
  return error instanceof Error && 'severity' in error && typeof (error as { code?: unknown }).code === 'string';
}

/** pg's `query_timeout` has passed: pg has no code for it. The server still works on the statement. */
export function isGivenUp(error: unknown): boolean {
  // Knex puts the statement before it.
  return error instanceof Error && error.message.endsWith('Query read timeout');
}

/** 25P02 in_failed_sql_transaction: "current transaction is aborted, commands ignored until end of transaction block". */
export const FAILED_TRANSACTION = '25P02';

/** 40003 statement_completion_unknown. */
export const COMPLETION_UNKNOWN = '40003';

/** 57014 query_canceled: by a CancelRequest of ours, by `pg_cancel_backend`, or by `statement_timeout`. */
export const QUERY_CANCELED = '57014';

/** 40001 serialization_failure and 40P01 deadlock_detected: the same work may succeed if it is done again (PostgreSQL: mvcc-serialization-failure-handling). */
export const TRANSIENT_FAILURES: ReadonlySet<unknown> = new Set(['40001', '40P01']);

const QUOTED_OR_COMMENT = /(?<!\w)e'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|"(?:[^"]|"")*"|\$(\w*)\$.*?\$\1\$|--[^\n]*|\/\*.*?\*\//gis;
const CONTROL =
  /(?:^|;)\s*(?:commit|end|abort|begin|start\s+transaction|prepare\s+transaction|rollback(?!(?:\s+(?:work|transaction))?\s+to\b))\b/i;

/** Without a look at its quotes and comments: true for many that do not. */
export function mayControlTransaction(sql: string): boolean {
  return /commit|end|abort|begin|transaction|rollback/i.test(sql);
}

/**
 * Whether a raw text would end or replace the transaction under the session's feet: COMMIT, END, ROLLBACK (but not ROLLBACK TO),
 * ABORT, BEGIN, START TRANSACTION or PREPARE TRANSACTION, alone or among other statements.
 */
export function controlsTransaction(sql: string): boolean {
  if (!mayControlTransaction(sql)) return false;
  const bare = sql.replace(QUOTED_OR_COMMENT, ' ');
  // The body of a function in standard SQL: CREATE FUNCTION ... BEGIN ATOMIC ...; END
  return CONTROL.test(bare.replace(/\bbegin\s+atomic\b.*?;\s*end\b/gis, ' '));
}
