import type { Transform } from 'node:stream';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { Acquisition } from './acquisition';
import type { Connection, KnexClient } from './connection';
import { ConnectionHold } from './connection-hold';
import {
  CommitUnknownError,
  SessionClosedError,
  SessionError,
  SessionTimeoutError,
  SessionUnavailableError,
  TransactionAbortedError,
} from './errors';
import { Interruption } from './interruption';
import { type Level, OpenSavepoints, savepointOver } from './open-savepoints';
import { destroyStream, OpenStreams } from './open-streams';
import { controlsTransaction, FAILED_TRANSACTION, isGivenUp, isRead, isServerError, QUERY_CANCELED, type Statement } from './postgres';
import { Lease, StatementQueue } from './statement-queue';
import type { TransactionOwner } from './transaction-owner';

/**
 * What has become of a session's work.
 * `'unused'`: no statement was run. `'open'`: a transaction is under way. `'unknown'`: the connection was lost during COMMIT.
 */
export type Outcome = 'unused' | 'open' | 'committed' | 'rolled back' | 'unknown';

export type Decision = 'commit' | 'rollback';

/**
 * One transaction: takes a connection with the first statement, runs statements one after the other, settles once,
 * gives the connection back. Knows no HTTP.
 *
 * The first claim to {@link settle} wins; its end is the ladder of decisions in {@link commit}; the connection is let go in
 * {@link finish} only.
 */
export class Transaction {
  outcome: Outcome = 'unused';
  /** The server's first error since the transaction was last healthy: what a later "transaction is aborted" means. */
  abortedBy: unknown;
  /** Why ROLLBACK could not be sent, or was not answered; the connection is destroyed then. */
  rollbackError: unknown;
  /** Set by setRollbackOnly(). */
  rollbackOnly: { readonly reason: unknown } | undefined;

  private opening: Promise<Connection> | undefined;
  private acquisition: Acquisition | undefined;
  private hold: ConnectionHold | undefined;
  private readonly interruption = new Interruption();
  private settlement: Promise<void> | undefined;
  private hasEnded = false;
  /** Set when COMMIT is on its way: it is left to finish. */
  private isCommitting = false;
  /** Why nothing can be committed any more. */
  private failure: unknown;
  /** Set when no new statement is taken: why. */
  private closedBecause: string | undefined;
  /** Set when statements that still wait for their turn must not run either: the work will be rolled back. */
  private isAbandoned = false;

  private readonly queue = new StatementQueue();
  // Made when they are needed: most sessions have neither, and many are never used.
  private streams: OpenStreams | undefined;
  private openSavepoints: OpenSavepoints | undefined;

  constructor(readonly owner: TransactionOwner) {}

  /** Whether a statement was ever asked for. */
  get isUsed(): boolean {
    return this.opening !== undefined;
  }

  get isSettled(): boolean {
    return this.settlement !== undefined;
  }

  get isConnected(): boolean {
    return this.hold !== undefined;
  }

  /** Why it was given up from outside. */
  get interruptedBy(): SessionError | undefined {
    return this.interruption.reason;
  }

  get signal(): AbortSignal {
    this.owner.onSignal();
    return this.interruption.signal;
  }

  /** The error for whoever comes after the end; made for each of them, so that its stack shows who it was. */
  get closed(): SessionClosedError | undefined {
    return this.closedBecause === undefined ? undefined : new SessionClosedError(this.closedBecause, this.interruption.reason);
  }

  setRollbackOnly(reason: unknown): void {
    this.assertOpen();
    if (!this.opening) this.owner.assertUsable();
    this.rollbackOnly ??= { reason };
  }

  get hasOpenStream(): boolean {
    return this.streams?.areOpen ?? false;
  }

  get savepoints(): OpenSavepoints {
    this.openSavepoints ??= new OpenSavepoints();
    return this.openSavepoints;
  }

  /** Takes part in the transaction, when it is its turn; every lease must be returned. */
  async lease(level: Level, isControl = false): Promise<Lease> {
    if (this.closedBecause !== undefined) {
      await this.afterRollback();
      this.assertOpen();
    }
    const turn = this.queue.turn();
    if (turn) await turn;
    try {
      // With a connection, it is refused when it is used: by a lease that is refused, Knex would end a stream, and the process.
      if (this.isAbandoned && !this.hold) this.assertOpen();
      this.opening ??= this.open();
      return new Lease(this.hold?.connection ?? (await this.opening), level, isControl);
    } catch (error) {
      this.queue.pass();
      await this.afterRollback();
      throw error;
    }
  }

  /** May be called again for the same lease: Knex does so for streams. */
  returnLease(lease: Lease): void {
    if (lease.isReturned) return;
    lease.isReturned = true;
    this.hold?.dispose(lease.__knex__disposed);
    // Knex returns a stream's lease when the stream closes, while the server is still busy with its cursor.
    if (!lease.isRunning || this.hold?.disposedBecause) this.pass(lease);
  }

  private pass(lease: Lease): void {
    if (lease.hasPassed) return;
    lease.hasPassed = true;
    this.queue.pass();
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

  /**
   * Ends the transaction. The first call decides; later ones get the same promise.
   *
   * @param because what a statement that comes later is told; see {@link SessionClosedError}
   * @returns rejects if a commit was wanted and did not happen
   */
  settle(decision: Decision, because: string): Promise<void> {
    if (this.settlement === undefined) {
      this.settlement = this.finish(decision, because);
      this.settlement.catch(() => {});
    }
    return this.settlement;
  }

  private async finish(decision: Decision, because: string): Promise<void> {
    try {
      if (decision === 'commit') {
        // Statements that this turn of the event loop issued without awaiting them belong to the work: they are drained.
        // What comes after them is refused by name, not lost.
        await nextTurn();
        this.close(because);
        await this.queue.drained();
        await this.commit();
      } else {
        this.isAbandoned = true;
        this.close(because);
        // A connection that is still on its way is given back when it comes.
        if (this.hold === undefined) this.acquisition?.giveUp(this.closed);
        await this.rollback();
      }
    } finally {
      const { hold } = this;
      this.hold = undefined;
      hold?.letGo();
      if (this.openSavepoints?.areOpen) {
        const { closed } = this;
        void this.afterRollback().then(() => this.openSavepoints?.abandon(closed));
      }
      this.hasEnded = true;
      if (this.isUsed) this.owner.onReleased();
    }
  }

  /**
   * Gives the transaction up, whatever its handler does: the statement that runs is cancelled, and rejects with the reason.
   * A COMMIT that is under way is left to finish.
   */
  interrupt(reason: SessionError, { mustDestroy = false } = {}): void {
    if (this.isCommitting || this.isAbandoned) return;
    if (mustDestroy) this.hold?.retire(reason);
    this.failure ??= reason;
    const wasOpen = this.settlement === undefined;
    // A listener may end the session, or answer: that is answered for like anything else the handler does.
    this.interruption.interrupt(reason);
    if (wasOpen) this.owner.onInterrupt(reason);
    else {
      // It waits for statements that were not awaited, in order to commit.
      this.isAbandoned = true;
      if (this.hold === undefined) this.acquisition?.giveUp(reason);
      else this.hold.stop(this.queue);
    }
  }

  /** The ladder: what keeps the work from being committed; then COMMIT, and what its answer means. */
  private async commit(): Promise<void> {
    const { hold } = this;
    const failure =
      this.failure ?? hold?.connection.lostBecause ?? this.statementGivenUp() ?? this.openSavepoints?.leftOpen(this.abortedBy);
    if (failure !== undefined || this.rollbackOnly) {
      await this.rollback();
      if (this.rollbackOnly && this.outcome !== 'unknown') return;
      throw failure;
    }
    if (!hold?.connection.hasBegun) return;
    this.isCommitting = true;
    try {
      await hold.commit(this.abortedBy);
      this.outcome = 'committed';
    } catch (error) {
      this.outcome = error instanceof CommitUnknownError ? 'unknown' : 'rolled back';
      throw error;
    }
  }

  /** Never rejects: a connection that cannot be rolled back is destroyed, and the server then does the same. */
  private async rollback(): Promise<void> {
    const { hold } = this;
    // A statement that takes long is cancelled, and one that nobody waits for at once: its work is not wanted.
    this.rollbackError = await hold?.rollback(this.queue, this.interruption.reason ? 0 : CANCEL_AFTER_MS);
    if (this.outcome === 'open' || hold?.disposedBecause) this.outcome = 'rolled back';
  }

  private async open(): Promise<Connection> {
    try {
      const limits = this.owner.onFirstUse();
      this.acquisition = new Acquisition((isWanted) => this.owner.connect(isWanted), limits.acquireTimeout);
      const hold = new ConnectionHold(await this.acquisition.connection, limits);
      this.hold = hold;
      hold.watch(
        () => this.streams?.movedAt ?? 0,
        () => this.interrupt(new SessionTimeoutError(limits.transactionTimeout)),
      );
      return hold.connection;
    } catch (error) {
      this.failure ??= error;
      this.owner.onReleased();
      throw error;
    }
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
    try {
      const result = await send(connection);
      // A transaction that has failed takes nothing but ROLLBACK TO: this one is healthy, whatever was before.
      this.abortedBy = undefined;
      if (this.openSavepoints?.areOpen && !isRead(statement)) this.openSavepoints.noteStatement(lease.level);
      return result;
    } catch (error) {
      failed = this.noteFailed(error);
      throw failed;
    } finally {
      try {
        await this.noteState(connection, failed);
      } finally {
        lease.isRunning = false;
        if (lease.isReturned) this.pass(lease);
        await this.tellAfterRollback(lease);
      }
    }
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
  private async afterRollback(): Promise<void> {
    if (!this.isAbandoned || this.hasEnded) return;
    await this.settlement?.catch(() => {});
    await nextTurn();
  }

  private assertOpen(): void {
    const error = this.closed;
    if (error) throw error;
  }

  private assertUsable(lease: Lease, statement: Statement): Connection {
    const connection = this.hold?.connection;
    if (this.failure) throw this.failure;
    if (connection === undefined || lease.connection !== connection || lease.isReturned || this.isAbandoned) {
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
    if (error instanceof SessionUnavailableError) this.failure ??= error;
    if (isGivenUp(error)) this.hold?.dispose(error);
    const isServers = isServerError(error);
    const reason =
      this.isAbandoned && !(isServers && error.code !== QUERY_CANCELED) ? (this.interruption.reason ?? this.closed) : undefined;
    if (reason) {
      // It is our doing: we have cancelled it, or destroyed its connection.
      reason.cause ??= error;
      return reason;
    }
    if (!isServers) return error;
    if (error.code === FAILED_TRANSACTION && error.cause === undefined) error.cause = this.abortedBy;
    this.abortedBy ??= error;
    return error;
  }

  /** After every statement; an error comes before the server is ready again, and its status is stale until then. */
  private async noteState(connection: Connection, failed: unknown): Promise<void> {
    if (!this.hold?.disposedBecause) await connection.whenReady();
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

  /** A savepoint has been rolled back. */
  noteRolledBack(savepoint: Level): void {
    this.failure ??= this.savepoints.rolledBack(savepoint);
  }

  /** The server may still work on it: nothing can follow on this connection, and nobody knows what it does. */
  private statementGivenUp(): TransactionAbortedError | undefined {
    const because = this.hold?.disposedBecause;
    return because === undefined ? undefined : new TransactionAbortedError(because);
  }

  private close(because: string): void {
    this.closedBecause = because;
    // A stream that nobody reads to its end would be waited for without end.
    if (this.streams?.areOpen) this.streams.destroy(this.interruption.reason ?? new SessionClosedError(because));
  }
}

function refuseControl(): SessionError {
  return new SessionError(
    'ERR_TRANSACTION_CONTROL',
    'A raw statement would have ended or replaced the transaction of the session. It was not sent, and the session will be rolled back. ' +
      'Use session.commit(), session.rollback() or session.transaction().',
  );
}

/** How long a rollback waits for the statement that still runs, before it asks the server to cancel it. */
const CANCEL_AFTER_MS = 50;
