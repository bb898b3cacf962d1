import { Autocommit, nothingToRollBack } from './autocommit';
import { settingsCommand, settingsToSet } from './beginning';
import type { KnexClient } from './connection';
import { SessionClosedError, SessionError } from './errors';
import type { HookKind } from './hooks';
import { type Level, savepointOver } from './open-savepoints';
import type { Session } from './session';
import type { Lease } from './statement-queue';
import type { Decision, Outcome, Transaction, Why } from './transaction';

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
    public transaction: Transaction,
    readonly parent: Scope | undefined,
  ) {}

  get root(): Scope {
    return this.parent?.root ?? this;
  }

  addHook(kind: HookKind, hook: unknown): void {
    if (this.isOver) throw savepointOver();
    this.transaction.addHook(kind, hook, this, this.root.face);
  }

  /** The id of the transaction in Knex's events, and the savepoint's name. */
  get txid(): string {
    return `session${this.number}`;
  }

  abstract commit(value?: unknown): Promise<void>;
  abstract rollback(error?: unknown): Promise<void>;
  abstract isCompleted(): boolean;
  abstract readonly isOver: boolean;
  abstract lease(): Promise<Lease>;
  /** See {@link Session.checkpoint}. */
  abstract checkpoint(): Promise<void>;
  /** See {@link Session.set}. */
  abstract set(settings: unknown): Promise<void>;
  /** Before the first statement of a session: whether there is a transaction at all. */
  decide(): void {}

  /** As Knex's: resolves with the value given to commit, rejects with the error given to rollback. */
  get executionPromise(): Promise<unknown> {
    if (this.execution === undefined) {
      this.execution = new Deferred();
      this.end?.(this.execution);
    }
    return this.execution.promise;
  }

  /** Takes note of settings that hold up to the end of the level above. */
  abstract noteSettings(settings: readonly [name: string, value: string][]): void;

  protected async apply(settings: readonly [name: string, value: string][]): Promise<void> {
    if (settings.length === 0) return;
    const { text: sql, values: bindings = [] } = settingsCommand(settings);
    const lease = await this.lease();
    try {
      await lease.connection.beforeSet?.(settings);
      await lease.transaction.query(lease, this.client, { sql, bindings });
      // Rolled back with a savepoint of another level, it would be missing.
      lease.transaction.noteWrite(lease.level);
    } finally {
      lease.transaction.returnLease(lease);
    }
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
  hasCheckpoint = false;
  isDecided = false;
  /** Set when the end was asked for, in contrast to a checkpoint. */
  private isEnding = false;

  constructor(transaction: Transaction) {
    super(transaction, undefined);
  }

  readonly isOver = false;

  override addHook(kind: HookKind, hook: unknown): void {
    this.decide();
    super.addHook(kind, hook);
  }

  lease(): Promise<Lease> {
    this.decide();
    return this.transaction.lease(this);
  }

  override decide(): void {
    const { transaction } = this;
    if (this.isDecided || transaction.isSettled) return;
    if (transaction.owner.wantsAutocommit()) this.transaction = Autocommit.inPlaceOf(transaction);
    this.isDecided = true;
  }

  /** Without a transaction yet, they go with its BEGIN. Those that have been set hold for the transactions after a checkpoint, too. */
  async set(settings: unknown): Promise<void> {
    const { transaction } = this;
    const pairs = settingsToSet(settings);
    if (transaction.isAutocommit || (!this.isDecided && transaction.owner.wantsAutocommit())) throw nothingToRollBack('set');
    transaction.assertOpen();
    if (transaction.isUsed) await this.apply(pairs);
    this.noteSettings(pairs);
  }

  override noteSettings(settings: readonly [string, string][]): void {
    this.transaction.owner.onSet(settings);
  }

  get outcome(): Outcome {
    const { outcome } = this.transaction;
    return outcome === 'unused' && this.hasCheckpoint ? 'committed' : outcome;
  }

  isCompleted(): boolean {
    return this.transaction.isSettled;
  }

  /** Commits, gives the connection back, and lets the next statement begin anew. */
  async checkpoint(): Promise<void> {
    const { transaction } = this;
    this.refuseInHooks('checkpoint');
    this.refuseRollbackOnly('checkpoint');
    if (this.isEnding) throw transaction.closed ?? new SessionClosedError('its end is under way.');
    if (transaction.isAutocommit && !transaction.hooks) return;
    await this.commitNow('session.checkpoint() is under way. Await it.', CHECKPOINT);
    // Ended meanwhile: nothing may begin any more.
    if (this.isEnding) return;
    this.transaction = transaction.next();
    this.hasCheckpoint = true;
    transaction.owner.onCheckpoint();
  }

  async commit(value?: unknown): Promise<void> {
    this.refuseInHooks('commit');
    this.refuseRollbackOnly('commit');
    this.isEnding = true;
    await this.commitNow('session.commit() has ended it. Call it after the last statement; for work after it, use withSession().', COMMIT);
    this.resolveExecution(value);
  }

  /** The end waits for the hook, which would wait for the end. */
  private refuseInHooks(name: string): void {
    if (!this.transaction.isRunningHooks && !this.transaction.isAfterEnd) return;
    throw new SessionClosedError(
      `session.${name}() was called while its hooks run, and its end waits for them. To roll back in a beforeCommit hook, throw, or call setRollbackOnly(); ` +
        'the others get a session of their own.',
    );
  }

  private refuseRollbackOnly(name: string): void {
    const { rollbackOnly } = this.transaction;
    if (!rollbackOnly) return;
    throw new SessionError(
      'ERR_ROLLBACK_ONLY',
      `session.${name}() was called after session.setRollbackOnly(). The session will be rolled back.`,
      rollbackOnly.reason,
    );
  }

  private async commitNow(because: string, why: Why): Promise<void> {
    const { transaction } = this;
    await this.settleTransaction('commit', because, why);
    if (transaction.outcome !== 'committed' && transaction.outcome !== 'unused') throw transaction.closed;
  }

  async rollback(error?: unknown): Promise<void> {
    const { transaction } = this;
    if (transaction.isAutocommit) throw nothingToRollBack('rollback');
    this.refuseInHooks('rollback');
    this.isRollbackErrorTold = true;
    await this.fail(error, 'session.rollback() has ended it. For work after it, use withSession().', 'rollback').catch((failure) => {
      // A commit that failed has done what is asked for.
      if (transaction.outcome !== 'rolled back') throw failure;
    });
    if (transaction.rollbackError) throw transaction.rollbackError;
    if (transaction.outcome === 'committed') throw transaction.closed;
  }

  /** Rolls back; `executionPromise` rejects with the error, if there is one. */
  fail(error: unknown, because: string, reason: Why['reason'] = 'error'): Promise<void> {
    const onSuccess = (): void => {
      if (error !== undefined) this.rejectExecution(error);
    };
    return this.settle('rollback', because, onSuccess, { reason, error });
  }

  /** Ends the session, whoever asks for it. Rejects if a commit was wanted and did not happen. */
  settle(decision: Decision, because: string, onSuccess?: () => void, why = RESPONSE): Promise<void> {
    this.isEnding = true;
    return this.settleTransaction(decision, because, why, () => {
      onSuccess?.();
      this.resolveExecution(undefined);
    });
  }

  private async settleTransaction(decision: Decision, because: string, why: Why, onSuccess?: () => void): Promise<void> {
    const { transaction } = this;
    let cause = why.error;
    try {
      await transaction.settle(decision, because, why);
      onSuccess?.();
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
  }
}

const RESPONSE: Why = { reason: 'response' };
const COMMIT: Why = { reason: 'commit' };
const CHECKPOINT: Why = { reason: 'checkpoint' };

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
