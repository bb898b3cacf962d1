import type { Transform } from 'node:stream';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { Acquisition } from './acquisition';
import type { Connection, KnexClient } from './connection';
import { Deadline, settledWithin } from './deadline';
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
import type { Limits } from './options';
import { controlsTransaction, FAILED_TRANSACTION, isGivenUp, isRead, isServerError, QUERY_CANCELED, type Statement } from './postgres';
import { Lease, StatementQueue } from './statement-queue';

/**
 * What has become of a session's work.
 * `'unused'`: no statement was run. `'open'`: a transaction is under way. `'unknown'`: the connection was lost during COMMIT.
 */
export type Outcome = 'unused' | 'open' | 'committed' | 'rolled back' | 'unknown';

export type Decision = 'commit' | 'rollback';

/** Whoever a transaction is made for. */
export interface TransactionOwner {
  /** Takes a connection. @param isWanted whether anybody still waits for it */
  connect(isWanted: () => boolean): Promise<Connection>;
  /** Throws if a transaction that has not been used can no longer be. */
  assertUsable(): void;
  /** Called before the first statement takes a connection; what it throws refuses the statement. @returns how long it may wait for what */
  onFirstUse(): Limits;
  /** Called when someone asks to be told of an interruption. */
  onSignal(): void;
  /** The transaction was interrupted while it was open: it must be settled now. */
  onInterrupt(reason: SessionError): void;
  /** It holds no connection any more, and waits for none. */
  onReleased(): void;
  /** Receives an error that no caller can. */
  onError(error: unknown): void;
}

/**
 * One transaction: takes a connection with the first statement, runs statements one after the other, settles once,
 * gives the connection back. Knows no HTTP.
 *
 * The first claim to {@link settle} wins; its end is the ladder of decisions in {@link commit}; the connection leaves in
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

  private connection: Connection | undefined;
  private opening: Promise<Connection> | undefined;
  private acquisition: Acquisition | undefined;
  private limits: Limits | undefined;
  private readonly deadline = new Deadline();
  private readonly interruption = new Interruption();
  private settlement: Promise<void> | undefined;
  /** Set when COMMIT is on its way: it is left to finish. */
  private isCommitting = false;
  /** Why nothing can be committed any more. */
  private failure: unknown;
  /** Why the connection must not be used again, and takes no ROLLBACK. */
  private disposedBecause: unknown;
  /** Why the connection is destroyed after its ROLLBACK. */
  private retiredBecause: unknown;
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
    return this.connection !== undefined;
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
    this.assertOpen();
    const turn = this.queue.turn();
    if (turn) await turn;
    try {
      // With a connection, it is refused when it is used: by a lease that is refused, Knex would end a stream, and the process.
      if (this.isAbandoned && !this.connection) this.assertOpen();
      this.opening ??= this.open();
      return new Lease(this.connection ?? (await this.opening), level, isControl);
    } catch (error) {
      this.queue.pass();
      throw error;
    }
  }

  /** May be called again for the same lease: Knex does so for streams. */
  returnLease(lease: Lease): void {
    if (lease.isReturned) return;
    lease.isReturned = true;
    this.disposedBecause ??= lease.__knex__disposed;
    // Knex returns a stream's lease when the stream closes, while the server is still busy with its cursor.
    if (!lease.isRunning || this.disposedBecause) this.queue.pass();
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
        if (this.connection === undefined) this.acquisition?.giveUp(this.closed);
        await this.rollback();
      }
    } finally {
      this.deadline.clear();
      const connection = this.connection;
      this.connection = undefined;
      connection?.release(this.disposedBecause ?? this.retiredBecause);
      if (this.openSavepoints?.areOpen) this.openSavepoints.abandon(this.closed);
      if (this.isUsed) this.owner.onReleased();
    }
  }

  /**
   * Gives the transaction up, whatever its handler does: the statement that runs is cancelled, and rejects with the reason.
   * A COMMIT that is under way is left to finish.
   */
  interrupt(reason: SessionError, { mustDestroy = false } = {}): void {
    if (this.isCommitting || this.interruption.reason) return;
    if (mustDestroy) this.retiredBecause = reason;
    this.failure ??= reason;
    this.interruption.interrupt(reason);
    if (this.settlement === undefined) this.owner.onInterrupt(reason);
    else {
      // It waits for statements that were not awaited, in order to commit.
      this.isAbandoned = true;
      if (this.connection === undefined) this.acquisition?.giveUp(reason);
      else this.bounded(this.stop()).catch(() => {});
    }
  }

  /** The ladder: what keeps the work from being committed; then COMMIT, and what its answer means. */
  private async commit(): Promise<void> {
    const connection = this.connection;
    const failure = this.failure ?? connection?.lostBecause ?? this.statementGivenUp() ?? this.openSavepoints?.leftOpen(this.abortedBy);
    if (failure !== undefined || this.rollbackOnly) {
      await this.rollback();
      if (this.rollbackOnly && this.outcome !== 'unknown') return;
      throw failure;
    }
    if (!connection?.hasBegun) return;
    this.isCommitting = true;
    try {
      await this.bounded(connection.commit(this.abortedBy));
      this.outcome = 'committed';
    } catch (error) {
      const failure = error === this.disposedBecause ? new CommitUnknownError(error) : error;
      this.outcome = failure instanceof CommitUnknownError ? 'unknown' : 'rolled back';
      throw failure;
    }
  }

  /** Never rejects: a connection that cannot be rolled back is destroyed, and the server then does the same. */
  private async rollback(): Promise<void> {
    if (this.connection) {
      try {
        await this.bounded(this.stop().then(() => this.sendRollback()));
      } catch (error) {
        this.disposedBecause ??= error;
        this.rollbackError = error;
      }
    }
    if (this.outcome === 'open' || this.disposedBecause) this.outcome = 'rolled back';
  }

  private async sendRollback(): Promise<void> {
    const connection = this.connection;
    // Lost, or busy with a statement that Knex has given up: it takes no ROLLBACK, and will be destroyed.
    if (connection?.hasBegun && !connection.lostBecause && !this.disposedBecause) await connection.rollback();
  }

  /** Waits until no statement runs. One that takes long is cancelled, and one that nobody waits for at once: its work is not wanted. */
  private async stop(): Promise<void> {
    if (!this.queue.isBusy) return;
    const drained = this.queue.drained();
    if (!this.interruption.reason) await settledWithin(CANCEL_AFTER_MS, drained);
    await this.connection?.cancel();
    await drained;
  }

  /** Bounds what a session that ends waits for. Past it, the connection is destroyed: its slot in the pool is free at once. */
  private bounded<T>(work: Promise<T>): Promise<T> {
    const { settleTimeout } = this.limits as Limits;
    return new Promise((resolve, reject) => {
      this.deadline.set(settleTimeout, () => {
        const error = new Error(`The database did not answer within ${settleTimeout} ms (settleTimeout).`);
        this.disposedBecause ??= error;
        this.connection?.destroy(error);
        reject(this.disposedBecause);
      });
      work.then(resolve, reject);
    });
  }

  private async open(): Promise<Connection> {
    try {
      const limits = this.owner.onFirstUse();
      this.limits = limits;
      this.acquisition = new Acquisition((isWanted) => this.owner.connect(isWanted), limits.acquireTimeout);
      this.connection = await this.acquisition.connection;
    } catch (error) {
      this.failure ??= error;
      this.owner.onReleased();
      throw error;
    }
    this.watch();
    return this.connection;
  }

  private watch(ms = (this.limits as Limits).transactionTimeout): void {
    const { transactionTimeout } = this.limits as Limits;
    this.deadline.set(ms, () => {
      const movedAt = this.streams?.movedAt ?? 0;
      const rest = Math.ceil(movedAt + transactionTimeout - performance.now());
      if (rest > 0) this.watch(rest);
      else this.interrupt(new SessionTimeoutError(transactionTimeout));
    });
  }

  private async run<T>(lease: Lease, statement: Statement, send: (connection: Connection) => Promise<T>): Promise<T> {
    const connection = this.assertUsable(lease, statement);
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
      await this.noteState(connection, failed).finally(() => {
        lease.isRunning = false;
        if (lease.isReturned && !this.disposedBecause) this.queue.pass();
      });
    }
  }

  private assertOpen(): void {
    const error = this.closed;
    if (error) throw error;
  }

  private assertUsable(lease: Lease, statement: Statement): Connection {
    const { connection } = this;
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
    if (isGivenUp(error)) this.disposedBecause ??= error;
    if (!isServerError(error)) return error;
    const reason = this.isAbandoned && error.code === QUERY_CANCELED ? (this.interruption.reason ?? this.closed) : undefined;
    if (reason) {
      reason.cause ??= error;
      return reason;
    }
    if (error.code === FAILED_TRANSACTION && error.cause === undefined) error.cause = this.abortedBy;
    this.abortedBy ??= error;
    return error;
  }

  /** After every statement; an error comes before the server is ready again, and its status is stale until then. */
  private async noteState(connection: Connection, failed: unknown): Promise<void> {
    if (!this.disposedBecause) await connection.whenReady();
    if (this.connection !== connection) return;
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
    return this.disposedBecause === undefined ? undefined : new TransactionAbortedError(this.disposedBecause);
  }

  private close(because: string): void {
    this.closedBecause = because;
    // A stream that nobody reads to its end would be waited for without end.
    if (this.streams?.areOpen) this.streams.destroy(new SessionClosedError(because));
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
