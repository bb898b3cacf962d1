import type { Transform } from 'node:stream';
import type { Connection, KnexClient } from './connection';
import type { ConnectionHold } from './connection-hold';
import { nextTurn } from './deadline';
import { SessionClosedError, SessionError, TransactionAbortedError } from './errors';
import type { Observation } from './events';
import type { Hooks } from './hooks';
import { Interruption } from './interruption';
import { type Level, OpenSavepoints, savepointOver } from './open-savepoints';
import { destroyStream, OpenStreams } from './open-streams';
import {
  controlsTransaction,
  FAILED_TRANSACTION,
  isGivenUp,
  isRead,
  isServerError,
  isWrite,
  mayControlTransaction,
  QUERY_CANCELED,
  type Statement,
} from './postgres';
import { Lease, StatementQueue } from './statement-queue';

/**
 * What has become of a session's work.
 * `'unused'`: no statement was run. `'open'`: a transaction is under way. `'unknown'`: the connection was lost during COMMIT.
 */
export type Outcome = 'unused' | 'open' | 'committed' | 'rolled back' | 'unknown';

/** The statements of a transaction: whether one may run, whose turn it is, and what its end says about the transaction. */
export abstract class StatementRunner {
  outcome: Outcome = 'unused';
  /** How many statements have written, if that is counted. */
  writes: number | undefined;
  /** The server's first error since the transaction was last healthy: what a later "transaction is aborted" means. */
  abortedBy: unknown;

  protected opening: Promise<Connection> | undefined;
  protected hold: ConnectionHold | undefined;
  protected settlement: Promise<void> | undefined;
  protected hasEnded = false;
  /** Why nothing can be committed any more. */
  protected failure: unknown;
  /** Set when no new statement is taken: why. */
  protected closedBecause: string | undefined;
  /** Set when statements that still wait for their turn must not run either: the work will be rolled back. */
  protected isAbandoned = false;
  /** Set while the end waits for hooks that run statements. */
  isRunningHooks = false;
  hooks: Hooks | undefined;

  protected readonly queue = new StatementQueue();
  // Made when they are needed: most sessions have neither, and many are never used.
  protected streams: OpenStreams | undefined;
  protected observation: Observation | undefined;
  protected openSavepoints: OpenSavepoints | undefined;

  /** @param interruption outlives the transaction, if another one follows it */
  constructor(readonly interruption = new Interruption()) {}

  /** Takes a connection. @param level of the first statement */
  protected abstract open(level: Level): Promise<Connection>;
  /** A statement was refused. */
  protected abstract noteRefused(error: unknown): void;

  /** The error for whoever comes after the end; made for each of them, so that its stack shows who it was. */
  get closed(): SessionClosedError | undefined {
    return this.closedBecause === undefined ? undefined : new SessionClosedError(this.closedBecause, this.interruption.reason);
  }

  get hasOpenStream(): boolean {
    return this.streams?.areOpen ?? false;
  }

  get savepoints(): OpenSavepoints {
    this.openSavepoints ??= new OpenSavepoints();
    return this.openSavepoints;
  }

  /** A savepoint has been rolled back. */
  noteRolledBack(savepoint: Level): void {
    this.failure ??= this.savepoints.rolledBack(savepoint);
    this.hooks?.drop(savepoint);
  }

  /** Takes part in the transaction, when it is its turn; every lease must be returned. */
  async lease(level: Level, isControl = false): Promise<Lease> {
    if (this.closedBecause !== undefined) {
      await this.afterRollback();
      this.assertOpen();
    }
    // What waits for its turn, or for the connection, was asked for in time.
    const isLate = this.failure instanceof SessionClosedError;
    const turn = this.queue.turn();
    if (turn) await turn;
    try {
      // With a connection, it is refused when it is used: by a lease that is refused, Knex would end a stream, and the process.
      if (this.isAbandoned && !this.hold && this.closed) throw this.closed;
      this.opening ??= this.open(level);
      return new Lease(this.hold?.connection ?? (await this.opening), level, isControl, this);
    } catch (error) {
      this.queue.pass();
      if (isLate) this.noteRefused(error);
      await this.afterRollback();
      throw error;
    }
  }

  /** May be called again for the same lease: Knex does so for streams. */
  returnLease(lease: Lease): void {
    if (lease.isReturned) return;
    lease.isReturned = true;
    this.hold?.dispose(lease.__knex__disposed);
    // Behind it, others wait for an answer that nobody knows when to expect.
    if (lease.__knex__disposed && lease.isShared) this.hold?.connection.destroy(lease.__knex__disposed as Error);
    // Knex returns a stream's lease when the stream closes, while the server is still busy with its cursor.
    if (!lease.isRunning || this.hold?.disposedBecause) this.pass(lease);
  }

  private pass(lease: Lease): void {
    if (lease.hasPassed) return;
    lease.hasPassed = true;
    if (lease.isShared) this.queue.leave();
    else this.queue.pass();
  }

  query(lease: Lease, client: KnexClient, statement: Statement): Promise<unknown> {
    return this.run(lease, statement, (connection) => connection.query(client, statement, lease.level.txid));
  }

  /** The connection is taken until the stream closes. */
  async stream(lease: Lease, client: KnexClient, statement: Statement, stream: Transform, options: unknown): Promise<void> {
    const closedError = this.closed;
    if (closedError) {
      // Nobody would read it to its end any more, and the session would wait for that.
      destroyStream(stream, closedError);
      throw closedError;
    }
    this.streams ??= new OpenStreams();
    await this.streams.feed(stream, (closed) =>
      this.run(lease, statement, (connection) =>
        Promise.race([connection.stream(client, statement, lease.level.txid, stream, options), closed]),
      ),
    );
  }

  private async run<T>(lease: Lease, statement: Statement, send: (connection: Connection) => Promise<T>): Promise<T> {
    let connection: Connection;
    try {
      connection = this.assertUsable(lease, statement);
    } catch (error) {
      await this.tellAfterRollback(lease);
      throw error;
    }
    let failed: unknown;
    lease.isRunning = true;
    this.hold?.noteStatement(statement);
    this.observation?.noteStatement(statement.sql);
    try {
      const sent = send(connection);
      if (connection.takesMore && isOneOfMany(statement) && !lease.hasPassed) {
        lease.isShared = true;
        this.queue.share();
      }
      const result = await sent;
      // A transaction that has failed takes nothing but ROLLBACK TO: this one is healthy, whatever was before.
      // One that shares its turn may hear of it behind the failure of the next.
      if (!lease.isShared) this.abortedBy = undefined;
      if (this.writes !== undefined && isWrite(statement)) this.writes++;
      if (this.openSavepoints?.areOpen && !isRead(statement)) this.noteWrite(lease.level);
      return result;
    } catch (error) {
      failed = this.noteFailed(error);
      throw failed;
    } finally {
      try {
        // An error comes before the server is ready again, and its status is stale until then.
        // With others under way, it is the last that looks.
        const ready = this.hold?.disposedBecause || this.queue.isSharedWithOthersThan(lease) ? true : connection.whenReady();
        if (ready !== true) await ready;
        this.noteState(connection, failed);
      } finally {
        lease.isRunning = false;
        if (lease.isReturned || lease.isShared) this.pass(lease);
        if (this.isAbandoned) await this.tellAfterRollback(lease);
      }
    }
  }

  /** Something of a level has changed, while savepoints of others may be open. */
  noteWrite(level: Level): void {
    if (this.openSavepoints?.areOpen) this.openSavepoints.noteStatement(level);
  }

  private async tellAfterRollback(lease: Lease): Promise<void> {
    if (!this.isAbandoned || this.hasEnded) return;
    // Knex returns it when it has been told.
    this.returnLease(lease);
    await this.afterRollback();
  }

  /**
   * Whoever waits for a statement of work that is being rolled back hears of it after the ROLLBACK: the error that he throws then must
   * not overtake the one that has ended the session.
   */
  protected async afterRollback(): Promise<void> {
    if (!this.isAbandoned || this.hasEnded) return;
    // The settlement waits for a hook, which waits for this.
    if (!this.isRunningHooks) await this.settlement?.catch(() => {});
    await nextTurn();
  }

  assertOpen(): void {
    const error = this.closed;
    if (!error) return;
    this.noteRefused(error);
    throw error;
  }

  private assertUsable(lease: Lease, statement: Statement): Connection {
    const connection = this.hold?.connection;
    if (this.failure) throw this.failure;
    // One that has shared its turn holds nothing up any more: COMMIT may be on its way.
    const isLate = lease.isShared && this.closedBecause !== undefined;
    if (connection === undefined || lease.connection !== connection || lease.isReturned || this.isAbandoned || isLate) {
      throw this.closed ?? new Error('Invalid connection for transaction query.');
    }
    if (connection.lostBecause) throw connection.lostBecause;
    const givenUp = this.statementGivenUp();
    if (givenUp) throw givenUp;
    // A statement that was not awaited would run outside of its savepoint, and outlive its ROLLBACK.
    if (lease.isOver) throw savepointOver();
    if (statement.method === 'raw' && controlsTransaction(statement.sql)) {
      // Whatever was meant by it has not happened; a COMMIT at the end might be the opposite.
      this.failure = refuseControl();
      throw this.failure;
    }
    return connection;
  }

  private noteFailed(error: unknown): unknown {
    if (error instanceof SessionError) this.failure ??= error;
    // Sent without its BEGIN: it may be stored, whatever becomes of the rest.
    if (error instanceof SessionError && error.code === 'ERR_TRANSACTION_CONTROL') this.outcome = 'unknown';
    if (isGivenUp(error)) this.hold?.dispose(error);
    const isServers = isServerError(error);
    // Our doing: we have cancelled it, or one in front of it, or destroyed its connection.
    const isOurs = !isServers || error.code === QUERY_CANCELED || (error.code === FAILED_TRANSACTION && this.abortedBy === undefined);
    const reason = this.isAbandoned && isOurs ? (this.interruption.reason ?? this.closed) : undefined;
    if (reason) {
      reason.cause ??= error;
      return reason;
    }
    if (!isServers) return error;
    if (error.code === FAILED_TRANSACTION && error.cause === undefined) error.cause = this.abortedBy;
    this.abortedBy ??= error;
    return error;
  }

  /** After every statement. */
  private noteState(connection: Connection, failed: unknown): void {
    if (this.hold?.connection !== connection) return;
    if (connection.hasBegun && this.outcome === 'unused') this.outcome = 'open';
    if (!connection.hasEndedByItself()) return;
    // A statement in disguise (a raw "...; COMMIT") has ended the transaction: all that came next would commit by itself.
    this.outcome = 'unknown';
    this.failure ??= new SessionError(
      'ERR_TRANSACTION_CONTROL',
      'A statement ended the transaction of the session (a COMMIT or ROLLBACK among several statements in one raw?). ' +
        'What came before it may be stored. Use session.commit() or session.rollback().',
      failed,
    );
    throw this.failure;
  }

  /** The server may still work on it: nothing can follow on this connection, and nobody knows what it does. */
  protected statementGivenUp(): TransactionAbortedError | undefined {
    const because = this.hold?.disposedBecause;
    return because === undefined ? undefined : new TransactionAbortedError(because);
  }
}

/**
 * Whether others may be sent before it is answered. Not if it is of a schema (without a method), which has several for one lease; nor if it
 * may end the transaction after all.
 */
function isOneOfMany({ method, sql }: Statement): boolean {
  return method !== undefined && !(method === 'raw' && mayControlTransaction(sql));
}

export function refuseControl(): SessionError {
  return new SessionError(
    'ERR_TRANSACTION_CONTROL',
    'A raw statement would have ended or replaced the transaction of the session. It was not sent, and the session will be rolled back. ' +
      'Use session.commit(), session.rollback() or session.transaction().',
  );
}
