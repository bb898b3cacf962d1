import type { KnexClient } from './connection';
import { SessionError } from './errors';
import type { Level } from './open-savepoints';
import type { Session } from './session';
import type { Lease } from './statement-queue';
import type { Decision, Transaction } from './transaction';

let scopes = 0;

/**
 * A level that statements run on and that can be committed or rolled back: the session itself, or a savepoint in it.
 * Its face (a Knex function) and its Knex client are made by knex-face.ts.
 */
export abstract class Scope implements Level {
  holdsOthers = false;
  /** Savepoints of one level run one after the other; this settles with the last of them. */
  lastChild: Promise<unknown> | undefined;
  face!: Session;
  client!: KnexClient;

  private readonly number = ++scopes;
  private execution: Deferred | undefined;
  private end: ((execution: Deferred) => void) | undefined;

  constructor(
    readonly transaction: Transaction,
    readonly parent: Scope | undefined,
  ) {}

  /** The id of the transaction in Knex's events, and the savepoint's name. */
  get txid(): string {
    return `session${this.number}`;
  }

  abstract commit(value?: unknown): Promise<void>;
  abstract rollback(error?: unknown): Promise<void>;
  abstract isCompleted(): boolean;
  abstract readonly isOver: boolean;
  abstract lease(): Promise<Lease>;

  /** As Knex's: resolves with the value given to commit, rejects with the error given to rollback. */
  get executionPromise(): Promise<unknown> {
    if (this.execution === undefined) {
      this.execution = new Deferred();
      this.end?.(this.execution);
    }
    return this.execution.promise;
  }

  protected resolveExecution(value: unknown): void {
    this.endExecution((execution) => execution.resolve(value));
  }

  protected rejectExecution(error: unknown): void {
    this.endExecution((execution) => execution.reject(error));
  }

  private endExecution(end: (execution: Deferred) => void): void {
    if (this.end) return;
    this.end = end;
    if (this.execution) end(this.execution);
  }
}

/** The session's own level: its end is the end of the transaction. */
export class SessionScope extends Scope {
  private isRollbackErrorTold = false;

  constructor(transaction: Transaction) {
    super(transaction, undefined);
  }

  readonly isOver = false;

  lease(): Promise<Lease> {
    return this.transaction.lease(this);
  }

  isCompleted(): boolean {
    return this.transaction.isSettled;
  }

  async commit(value?: unknown): Promise<void> {
    const { transaction } = this;
    if (transaction.rollbackOnly) {
      throw new SessionError(
        'ERR_ROLLBACK_ONLY',
        'session.commit() was called after session.setRollbackOnly(). The session will be rolled back.',
        transaction.rollbackOnly.reason,
      );
    }
    await this.settle(
      'commit',
      'session.commit() has ended it. Call it after the last statement; for work after it, use withSession().',
      () => this.resolveExecution(value),
    );
    if (transaction.outcome !== 'committed' && transaction.outcome !== 'unused') throw transaction.closed;
  }

  async rollback(error?: unknown): Promise<void> {
    const { transaction } = this;
    this.isRollbackErrorTold = true;
    await this.fail(error, 'session.rollback() has ended it. For work after it, use withSession().').catch((failure) => {
      // A commit that failed has done what is asked for.
      if (transaction.outcome !== 'rolled back') throw failure;
    });
    if (transaction.rollbackError) throw transaction.rollbackError;
    if (transaction.outcome === 'committed') throw transaction.closed;
  }

  /** Rolls back; `executionPromise` rejects with the error, if there is one. */
  fail(error: unknown, because: string): Promise<void> {
    const onSuccess = (): void => {
      if (error !== undefined) this.rejectExecution(error);
    };
    return this.settle('rollback', because, onSuccess, error);
  }

  /** Ends the session, whoever asks for it. Rejects if a commit was wanted and did not happen. @param first why it is rolled back */
  async settle(decision: Decision, because: string, onSuccess?: () => void, first?: unknown): Promise<void> {
    const { transaction } = this;
    let cause = first;
    try {
      await transaction.settle(decision, because);
    } catch (error) {
      cause = error;
      this.rejectExecution(error);
      throw error;
    } finally {
      const { rollbackError } = transaction;
      if (rollbackError && !this.isRollbackErrorTold) {
        this.isRollbackErrorTold = true;
        // Whoever reads of it in a log wants to know what it came after.
        if (rollbackError instanceof Error && rollbackError !== cause) rollbackError.cause ??= cause;
        transaction.owner.onError(rollbackError);
      }
    }
    onSuccess?.();
    this.resolveExecution(undefined);
  }
}

class Deferred {
  resolve!: (value: unknown) => void;
  reject!: (error: unknown) => void;
  readonly promise = new Promise<unknown>((resolve, reject) => {
    this.resolve = resolve;
    this.reject = reject;
  });

  constructor() {
    // Whoever looks at the promise hears of it; nobody has to.
    this.promise.catch(() => {});
  }
}
