import { performance } from 'node:perf_hooks';
import type { Connection } from './connection';
import { Deadline, settledWithin } from './deadline';
import { CommitUnknownError } from './errors';
import type { Statement } from './postgres';
import type { Terms } from './resolve-options';
import type { StatementQueue } from './statement-queue';

/**
 * A session's hold on its connection. All that is waited for meanwhile has its limit: past `transactionTimeout` the session is told, and
 * past `settleTimeout` the connection is destroyed, which frees its slot in the pool at once.
 */
export class ConnectionHold {
  /** Why the connection must not be used again, and takes no ROLLBACK. */
  disposedBecause: unknown;
  /** Why the connection is destroyed after its ROLLBACK. */
  private retiredBecause: unknown;
  private mayHaveOtherModes = false;
  private readonly deadline = new Deadline();

  constructor(
    readonly connection: Connection,
    private readonly limits: Terms,
  ) {}

  /** @param movedAt when a stream has moved last, as `performance.now()` tells the time: that extends the time */
  watch(movedAt: () => number, onTooLong: () => void, ms = this.limits.transactionTimeout): void {
    this.deadline.set(ms, () => {
      const rest = Math.ceil(movedAt() + this.limits.transactionTimeout - performance.now());
      if (rest > 0) this.watch(movedAt, onTooLong, rest);
      else onTooLong();
    });
  }

  /** Whether there is nothing that a COMMIT could fail to store, or refuse (PostgreSQL: serializable ones are checked at their end). */
  get losesNothing(): boolean {
    const { readOnly, isolationLevel } = this.limits.beginning.modes;
    return readOnly === true && isolationLevel !== 'serializable' && !this.mayHaveOtherModes;
  }

  /** SET TRANSACTION may change the modes, as the first statement. */
  noteStatement({ sql }: Statement): void {
    if (this.limits.beginning.modes.readOnly && /\bset(?:_config)?\b/i.test(sql)) this.mayHaveOtherModes = true;
  }

  dispose(because: unknown): void {
    this.disposedBecause ??= because;
  }

  retire(because: unknown): void {
    this.retiredBecause = because;
  }

  commit(abortedBy: unknown): Promise<void> {
    return this.bounded('COMMIT was not answered', this.connection.commit(abortedBy), (error) => new CommitUnknownError(error));
  }

  /**
   * @param onSend called before ROLLBACK is sent, if it is
   * @returns the error, if the server may not have heard of it
   */
  async rollback(queue: StatementQueue, cancelAfterMs: number, onSend: () => void): Promise<unknown> {
    try {
      const work = this.endStatement(queue, cancelAfterMs).then(() => this.sendRollback(onSend));
      await this.bounded('The running statement, or its ROLLBACK, did not end', work);
      return undefined;
    } catch (error) {
      this.disposedBecause ??= error;
      queue.abandon();
      return error;
    }
  }

  /** Cancels the statement that runs. */
  stop(queue: StatementQueue): void {
    this.bounded('The running statement did not end', this.endStatement(queue, 0)).catch(() => queue.abandon());
  }

  /** Gives the connection back, or destroys it. */
  letGo(): void {
    this.deadline.clear();
    this.connection.release(this.disposedBecause ?? this.retiredBecause);
  }

  private async sendRollback(onSend: () => void): Promise<void> {
    // Lost, or busy with a statement that Knex has given up: it takes no ROLLBACK, and will be destroyed.
    const { hasBegun, lostBecause } = this.connection;
    if (!hasBegun || lostBecause || this.disposedBecause) return;
    onSend();
    await this.connection.rollback();
  }

  private async endStatement(queue: StatementQueue, cancelAfterMs: number): Promise<void> {
    const drained = queue.drained();
    if (!drained) return;
    if (cancelAfterMs > 0) await settledWithin(cancelAfterMs, drained);
    let isDrained = false;
    void drained.then(() => {
      isDrained = true;
    });
    // One that waits behind another, as the first does behind BEGIN in some cases, begins only when that has been cancelled.
    while (!isDrained && !this.disposedBecause && !this.connection.lostBecause) {
      await this.connection.cancel();
      await settledWithin(CANCEL_AGAIN_AFTER_MS, drained);
    }
    await drained;
  }

  /** @param tell what the caller is told of the time limit */
  private bounded<T>(what: string, work: Promise<T>, tell = (error: unknown): unknown => error): Promise<T> {
    const { settleTimeout } = this.limits;
    return new Promise((resolve, reject) => {
      this.deadline.set(settleTimeout, () => {
        const error = new Error(`${what} within ${settleTimeout} ms (settleTimeout); its connection is given up.`);
        this.disposedBecause ??= error;
        this.connection.destroy(error);
        reject(tell(this.disposedBecause));
      });
      work.then(resolve, reject);
    });
  }
}

const CANCEL_AGAIN_AFTER_MS = 50;
