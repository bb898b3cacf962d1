import type { Knex } from 'knex';
import { settingsToSet } from './beginning';
import { SessionError } from './errors';
import { savepointOver } from './open-savepoints';
import { Scope } from './scope';
import type { Session } from './session';
import type { Lease } from './statement-queue';

/** What Knex's `transaction(container)` is given: returns a promise, or ends the transaction by its own calls. */
export type Container = (transaction: Session) => unknown;

/** A savepoint: what `session.transaction()` opens. */
export class Savepoint extends Scope {
  private isEnded = false;
  private readonly settings: [string, string][] = [];

  private constructor(
    override readonly parent: Scope,
    private readonly config: Knex.TransactionConfig,
  ) {
    super(parent.transaction, parent);
  }

  /**
   * Runs a container in a savepoint, after the savepoints that were asked for before it on the same level.
   *
   * @param dress gives the new level its face and client
   * @returns the container's result; rejects if it failed, or the savepoint did
   */
  static open(
    parent: Scope,
    container: Container,
    config: Knex.TransactionConfig,
    dress: (savepoint: Savepoint) => void,
  ): Promise<unknown> {
    const execute = (): Promise<unknown> => {
      const savepoint = new Savepoint(parent, config);
      dress(savepoint);
      return savepoint.execute(container);
    };
    // Two steps later than now, so that statements of a Promise.all([statement, savepoint]) have asked for their turns: run
    // behind SAVEPOINT, they would be rolled back with it.
    const result = (parent.lastChild ?? Promise.resolve()).then(() => {}).then(execute);
    const ended = result
      .catch(() => {})
      .then(() => {
        if (parent.lastChild === ended) parent.lastChild = undefined;
      });
    parent.lastChild = ended;
    return result;
  }

  abandon(error: unknown): void {
    this.rejectExecution(error);
  }

  isCompleted(): boolean {
    return this.isEnded || this.parent.isCompleted();
  }

  get isOver(): boolean {
    return this.isEnded || this.parent.isOver;
  }

  async lease(): Promise<Lease> {
    if (this.isOver) throw savepointOver();
    return this.transaction.lease(this);
  }

  async set(settings: unknown): Promise<void> {
    const pairs = settingsToSet(settings);
    await this.apply(pairs);
    this.noteSettings(pairs);
  }

  override noteSettings(settings: readonly [string, string][]): void {
    this.settings.push(...settings);
  }

  async checkpoint(): Promise<void> {
    throw new SessionError(
      'ERR_SAVEPOINT_OPEN',
      'checkpoint() commits the whole session, and was called on a savepoint. Call it on the session, after the end of the savepoint.',
    );
  }

  async commit(value?: unknown): Promise<void> {
    if (this.isEnded) return;
    this.isEnded = true;
    try {
      await this.send(`RELEASE SAVEPOINT ${this.txid};`, () => this.transaction.savepoints.released(this));
    } catch (error) {
      // Left as it is, the failed savepoint would take the whole transaction with it.
      if (!this.parent.isOver) await this.rollBackTo().catch(() => {});
      this.rejectExecution(error);
      throw error;
    }
    this.parent.noteSettings(this.settings);
    this.resolveExecution(value);
  }

  async rollback(error?: unknown): Promise<void> {
    if (this.isEnded) return;
    this.isEnded = true;
    try {
      if (!this.parent.isOver) await this.rollBackTo();
    } catch (failure) {
      this.rejectExecution(error ?? failure);
      throw failure;
    }
    if (error !== undefined) this.rejectExecution(error);
    else if (this.config.doNotRejectOnRollback === false) {
      this.rejectExecution(new Error('Transaction rejected with non-error: undefined'));
    } else this.resolveExecution(undefined);
  }

  private async execute(container: Container): Promise<unknown> {
    if (this.parent.isOver) throw savepointOver();
    await this.send(`SAVEPOINT ${this.txid};`, () => this.transaction.savepoints.begun(this));
    if (this.parent.isOver) throw savepointOver();
    const result = callSafely(container, this.face);
    if (isThenable(result)) {
      // executionPromise tells of a failure.
      result
        .then(
          (value) => this.commit(value),
          (error) => this.rollback(error),
        )
        .then(undefined, () => {});
    }
    return this.executionPromise;
  }

  private async rollBackTo(): Promise<void> {
    await this.send(`ROLLBACK TO SAVEPOINT ${this.txid}`, () => this.transaction.noteRolledBack(this));
  }

  /** @param note takes note of it before anyone else's turn comes, be it COMMIT's */
  private async send(sql: string, note: () => void): Promise<void> {
    const { transaction } = this;
    const lease = await transaction.lease(this, true);
    try {
      await transaction.query(lease, this.client, { sql });
      note();
    } finally {
      transaction.returnLease(lease);
    }
  }
}

function callSafely(container: Container, face: Session): unknown {
  try {
    return container(face);
  } catch (error) {
    return Promise.reject(error);
  }
}

function isThenable(value: unknown): value is PromiseLike<unknown> {
  return typeof (value as { then?: unknown } | null | undefined)?.then === 'function';
}
