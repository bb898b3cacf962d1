import type { Command } from './beginning';

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
  query(text: string, values: readonly unknown[], callback: QueryCallback): unknown;
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

/** pg's `Query`, as far as {@link groupedQueryOf} builds on it. */
interface PgQuery {
  name?: string | undefined;
  binary?: boolean;
  requiresPreparation(): boolean;
  handleCopyInResponse(wire: Wire): void;
  prepare(wire: Wire): void;
  handleDataRow(message: unknown): void;
  handleCommandComplete(message: unknown, wire: Wire): void;
}
type PgQueryClass = new (query: object | string, values: unknown, callback: QueryCallback) => PgQuery;

/** What Knex asks pg to send. */
interface QueryConfig {
  readonly text: string;
  readonly values: readonly unknown[];
}

/** Whether it has no more to say than text and values. */
function isPlain(config: object): config is QueryConfig {
  for (const name in config) if (name !== 'text' && name !== 'values') return false;
  const { text, values } = config as Partial<QueryConfig>;
  return typeof text === 'string' && Array.isArray(values);
}

/** What Knex takes for the connection, for one statement. */
export class StatementConnection {
  constructor(
    readonly __knexUid: string | undefined,
    readonly __knexTxId: string | undefined,
    readonly query: SendQuery,
  ) {}
}

/** pg's `query`, as Knex calls it. */
export type SendQuery = (config: object, callback: QueryCallback) => unknown;

/** pg copies an object with the descriptors of all its properties, which takes longer than all else that it does to send a statement. */
export function sendTo(connection: PgConnection): SendQuery {
  return (config, callback) =>
    isPlain(config) ? connection.query(config.text, config.values, callback) : connection.query(config, callback);
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

/** Follows the commands that were sent ahead of the first statement. */
export interface Preamble {
  readonly commands: readonly Command[];
  /** Whether the driver was asked to send them. */
  isRequested: boolean;
  completed: number;
  /** Commands that have been sent already, by another statement. */
  readonly isBehind?: boolean;
}

/**
 * Puts commands (BEGIN) in front of a statement, under **one Sync**: no round trip more. If a command fails, the server skips
 * all that follows up to the Sync (PostgreSQL: "Extended Query", protocol-flow), so the statement never runs without it.
 *
 * 1. Returns what is to be used in place of the connection's `query`, for one statement.
 * 2. A named prepared statement and a paged one (`rows`) are not grouped: pg would take the answer to the command's Parse for theirs.
 * 3. Several statements in one string are not: the extended protocol refuses them.
 * 4. pg-native has no wire to write to: undefined.
 * 5. In pg's pipeline mode, statements that follow before the answer to BEGIN (`isBehind`) ask for the portal that BEGIN was run in: a
 *    portal ends with its transaction, so if there is none, the server skips them as well.
 */
export function precededBy(connection: PgConnection, preamble: Preamble): SendQuery | undefined {
  const Query = (connection.constructor as { Query?: PgQueryClass }).Query;
  if (Query === undefined || typeof connection.connection?.parse !== 'function') return undefined;
  return (config, callback) => {
    preamble.isRequested = true;
    return connection.query(new (groupedQueryOf(Query))(config, callback, preamble, connection.pipeline === true));
  };
}

/** What is sent up to the end of this turn goes in one piece. */
export function holdTogether({ connection }: PgConnection): void {
  const stream = connection?.stream;
  if (stream === undefined || corked.has(stream)) return;
  corked.add(stream);
  stream.cork();
  // After all microtasks: the statements that were issued together follow one another in those.
  process.nextTick(() => {
    corked.delete(stream);
    stream.uncork();
  });
}

const corked = new WeakSet<object>();

/** Whether a statement can share its Sync with the commands before it; see {@link precededBy}. */
export function isGroupable({ sql, bindings, options }: Statement): boolean {
  // Knex refuses an empty statement before the driver is asked: BEGIN would be announced and never sent.
  if (!sql) return false;
  if (options !== undefined && ('name' in options || 'rows' in options)) return false;
  // With parameters pg speaks the extended protocol anyway; without, a semicolon may separate two statements.
  return (bindings !== undefined && bindings.length > 0) || !/;\s*\S/.test(sql);
}

const groupedQueries = new WeakMap<PgQueryClass, ReturnType<typeof makeGroupedQuery>>();

function groupedQueryOf(Query: PgQueryClass) {
  let grouped = groupedQueries.get(Query);
  if (grouped === undefined) {
    grouped = makeGroupedQuery(Query);
    groupedQueries.set(Query, grouped);
  }
  return grouped;
}

function makeGroupedQuery(Query: PgQueryClass) {
  return class GroupedQuery extends Query {
    constructor(
      config: object,
      callback: QueryCallback,
      readonly preamble: Preamble,
      private readonly isPipelined: boolean,
    ) {
      const hasAll = isPlain(config);
      super(hasAll ? config.text : config, hasAll ? config.values : undefined, callback);
      // Unnamed to the server, and named to tracers that put their comment into a copy of it (instrumentation-pg): pg makes a query of its own
      // of a copy, without BEGIN.
      this.name = '';
    }

    // The extended protocol also where pg would use the simple one, which cannot be grouped (pg < 8.12 has no `queryMode`).
    override requiresPreparation(): boolean {
      return true;
    }

    // Here and not in `submit`: pg has checked the statement by now, so the Sync at its end is certain to follow.
    override prepare(wire: Wire): void {
      if (this.preamble.isBehind) wire.describe({ type: 'P', name: BEGIN_PORTAL });
      // As pg does: one that has ended is told by its 'close'.
      else if (wire.stream.writable) wire.stream.write(preambleBytes(wire, this.preamble.commands, this.isPipelined ? BEGIN_PORTAL : ''));
      // The simple protocol's results are text, whatever the connection asks for otherwise.
      if (!super.requiresPreparation()) this.binary = false;
      super.prepare(wire);
    }

    // The server ignores the Sync of the group while it waits for COPY's data, and pg refuses to send any.
    override handleCopyInResponse(wire: Wire): void {
      super.handleCopyInResponse(wire);
      wire.sync();
    }

    override handleDataRow(message: unknown): void {
      if (isComplete(this.preamble)) super.handleDataRow(message);
    }

    override handleCommandComplete(message: unknown, wire: Wire): void {
      if (isComplete(this.preamble)) super.handleCommandComplete(message, wire);
      else this.preamble.completed++;
    }
  };
}

/** A connection whose messages are kept. */
function collecting(wire: Wire, written: Uint8Array[]): Wire {
  const stream = { writable: true, write: (bytes: Uint8Array) => written.push(bytes) };
  return Object.create(wire, { stream: { value: stream } });
}

/** Whether a statement was skipped because there was no BEGIN before it. */
export function hasFoundNoBegin(error: unknown): boolean {
  return isServerError(error) && error.message.includes(BEGIN_PORTAL);
}

const BEGIN_PORTAL = 'express-knex-session begin';
/** There are few texts of BEGIN, and they are sent very often. */
const bytesOfBegin = new Map<string, Uint8Array>();

function preambleBytes(wire: Wire, [begin, ...others]: readonly Command[], portal: string): Uint8Array {
  const key = portal + (begin as Command).text;
  let bytes = bytesOfBegin.get(key);
  if (bytes === undefined) {
    bytes = bytesOf(wire, [begin as Command], portal);
    bytesOfBegin.set(key, bytes);
  }
  return others.length === 0 ? bytes : Buffer.concat([bytes, bytesOf(wire, others)]);
}

function bytesOf(wire: Wire, commands: readonly Command[], portal = ''): Uint8Array {
  const written: Uint8Array[] = [];
  const sender = collecting(wire, written);
  for (const { text, values = [] } of commands) {
    sender.parse({ text });
    sender.bind({ portal, values });
    sender.execute({ portal });
  }
  return Buffer.concat(written);
}

export function isComplete(preamble: Preamble): boolean {
  return preamble.completed >= preamble.commands.length;
}

/** Runs a command and returns its tag, which Knex throws away: COMMIT may be answered with ROLLBACK. */
export function runCommand(connection: PgConnection, { text, values }: Command): Promise<string> {
  return new Promise((resolve, reject) => {
    connection.query(values ? { text, values } : text, (error, result) => (error ? reject(error) : resolve(result?.command ?? '')));
  });
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
