import type { Command } from './beginning';
import { isServerError, type PgConnection, type QueryCallback, type Statement, type Wire } from './postgres';

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
type PgQueryClass = new (query: object | string, values: unknown, callback: QueryCallback | undefined) => PgQuery;

/** What Knex asks pg to send. */
interface QueryConfig {
  readonly text: string;
  readonly values: readonly unknown[];
}

/** Whether it has no more to say than text and values. */
function hasTextAndValuesOnly(config: object | string): config is QueryConfig {
  if (typeof config === 'string') return false;
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

/** pg's `query`. Knex calls it with a configuration and a callback. */
export type SendQuery = (config: object | string, values: unknown, callback?: QueryCallback) => unknown;

/**
 * pg copies an object with the descriptors of all its properties, which takes longer than all else that it does to send a statement. But a
 * wrapper that an application has put on a connection may know only what Knex calls.
 */
export function sendTo(connection: PgConnection): SendQuery {
  return (config, values, callback) => {
    if (callback !== undefined) return connection.query(config, values, callback);
    if (!hasTextAndValuesOnly(config) || Object.hasOwn(connection, 'query')) return connection.query(config, values as QueryCallback);
    return connection.query(config.text, config.values, values as QueryCallback);
  };
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
  return (config, values, callback) => {
    preamble.isRequested = true;
    return connection.query(new (groupedQueryOf(Query))(config, values, callback, preamble, connection.pipeline === true));
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
      config: object | string,
      values: unknown,
      callback: QueryCallback | undefined,
      readonly preamble: Preamble,
      private readonly isPipelined: boolean,
    ) {
      const parts = callback === undefined && hasTextAndValuesOnly(config) ? config : undefined;
      super(parts?.text ?? config, parts?.values ?? values, parts ? (values as QueryCallback) : callback);
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
