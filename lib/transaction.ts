import { Acquisition } from './acquisition';
import type { Connection } from './connection';
import { ConnectionHold } from './connection-hold';
import { nextTurn } from './deadline';
import { CommitUnknownError, SessionClosedError, type SessionError, SessionTimeoutError, SessionUnavailableError } from './errors';
import { areTransactionsObserved, Observation, publishLateUse, type SettleReason } from './events';
import { type HookKind, Hooks, mustBeHook } from './hooks';
import type { Interruption } from './interruption';
import type { Level } from './open-savepoints';
import type { Terms } from './resolve-options';
import type { Session } from './session';
import { StatementRunner } from './statement-runner';
import type { TransactionOwner } from './transaction-owner';

export type { Outcome } from './statement-runner';

export type Decision = 'commit' | 'rollback';

/** Why a transaction is settled. */
export interface Why {
  readonly reason: SettleReason;
  readonly error?: unknown;
}

function rootOf(level: Level): Level {
  return level.parent ? rootOf(level.parent) : level;
}

function reasonOf(interruptedBy: SessionError): SettleReason {
  if (interruptedBy instanceof SessionTimeoutError) return 'timeout';
  return interruptedBy instanceof SessionUnavailableError ? 'shutdown' : 'disconnect';
}

/**
 * One transaction: takes a connection with the first statement, runs statements one after the other, settles once,
 * gives the connection back. Knows no HTTP.
 *
 * The first claim to {@link settle} wins; its end is the ladder of decisions in {@link commit}; the connection is let go in
 * {@link finish} only.
 */
export class Transaction extends StatementRunner {
  /** Why ROLLBACK could not be sent, or was not answered; the connection is destroyed then. */
  rollbackError: unknown;
  /** Set by setRollbackOnly(). */
  rollbackOnly: { readonly reason: unknown } | undefined;

  private acquisition: Acquisition | undefined;
  /** Whether each statement commits by itself, and there is nothing to roll back. */
  readonly isAutocommit: boolean = false;
  /** Set while hooks run after its end. */
  isAfterEnd = false;
  /** Whether there was nothing to store, though it has committed. */
  hasStoredNothing = false;
  /** COMMIT's answer, where nobody waits for it. */
  private unwatchedCommit: Promise<void> | undefined;
  /** Set when COMMIT is on its way: it is left to finish. */
  private isCommitting = false;

  constructor(
    readonly owner: TransactionOwner,
    interruption?: Interruption,
  ) {
    super(interruption);
  }

  /** A transaction for the same owner, after the end of this one. */
  next(): Transaction {
    const next = new Transaction(this.owner, this.interruption);
    if (this.writes !== undefined) next.writes = 0;
    return next;
  }

  /** Whether a statement was ever asked for. */
  get isUsed(): boolean {
    return this.opening !== undefined;
  }

  get isSettled(): boolean {
    return this.settlement !== undefined;
  }

  get isConnected(): boolean {
    return this.hold !== undefined || this.unwatchedCommit !== undefined;
  }

  /** Why it was given up from outside. */
  get interruptedBy(): SessionError | undefined {
    return this.interruption.reason;
  }

  get signal(): AbortSignal {
    this.owner.onSignal();
    return this.interruption.signal;
  }

  setRollbackOnly(reason: unknown): void {
    this.assertOpen();
    if (!this.opening) this.owner.assertUsable();
    this.rollbackOnly ??= { reason };
  }

  /**
   * Ends the transaction. The first call decides; later ones get the same promise.
   *
   * @param because what a statement that comes later is told; see {@link SessionClosedError}
   * @param why what observers are told, unless there is an error of its own
   * @returns rejects if a commit was wanted and did not happen
   */
  settle(decision: Decision, because: string, why: Why): Promise<void> {
    if (this.settlement === undefined) {
      this.settlement = this.finish(decision, because, why);
      this.settlement.catch(() => {});
    }
    return this.settlement;
  }

  private async finish(decision: Decision, because: string, why: Why): Promise<void> {
    let told = why;
    try {
      if (decision === 'commit') {
        // Statements that this turn of the event loop issued without awaiting them belong to the work: they are drained.
        // What comes after them is refused by name, not lost.
        await nextTurn();
        if (this.hooks) await this.runHooksBefore(this.hooks);
        this.close(because);
        const drained = this.queue.drained();
        if (drained) await drained;
        await this.commit();
      } else {
        this.isAbandoned = true;
        this.close(because);
        // A connection that is still on its way is given back when it comes.
        if (this.hold === undefined) this.acquisition?.giveUp(this.interruption.reason ?? this.closed);
        await this.rollback();
      }
    } catch (error) {
      told = { reason: 'error', error };
      if (this.hooks && this.owner.willRepeat(error)) this.hooks = undefined;
      throw error;
    } finally {
      const { hold, unwatchedCommit } = this;
      this.hold = undefined;
      if (!unwatchedCommit) hold?.letGo();
      if (this.openSavepoints?.areOpen) {
        const reason = this.interruption.reason ?? this.closed;
        void this.afterRollback().then(() => this.openSavepoints?.abandon(reason));
      }
      this.hasEnded = true;
      if (unwatchedCommit) {
        void unwatchedCommit.then(() => {
          this.unwatchedCommit = undefined;
          hold?.letGo();
          this.owner.onReleased(this);
          this.tellSettled(told);
        });
      } else if (this.isUsed) {
        this.owner.onReleased(this);
        this.tellSettled(told);
      }
      if (this.hooks) await this.runHooksAfter(this.hooks, decision);
    }
  }

  private tellSettled({ reason, error }: Why): void {
    const { observation, outcome, rollbackOnly } = this;
    if (observation === undefined) return;
    const interruptedBy = this.interruption.reason;
    const ended = outcome === 'open' ? 'rolled back' : outcome;
    if (interruptedBy && outcome !== 'committed') observation.settled(ended, reasonOf(interruptedBy), interruptedBy);
    else if (rollbackOnly && reason !== 'error') observation.settled(ended, 'rollback only', rollbackOnly.reason);
    else observation.settled(ended, reason, error);
  }

  protected noteRefused(error: unknown): void {
    publishLateUse(this.owner, error);
  }

  /** @param level where it was registered: it is dropped with its savepoint */
  addHook(kind: HookKind, hook: unknown, level: Level, session: Session): void {
    mustBeHook(kind, hook);
    this.assertOpen();
    if (!this.opening) this.owner.assertUsable();
    this.owner.onHook();
    this.hooks ??= new Hooks();
    this.hooks.add(kind, hook, level, session);
  }

  /** They work in the session, which is open, and whoever interrupts it does not wait for them. */
  private async runHooksBefore(hooks: Hooks): Promise<void> {
    if (this.failure || this.rollbackOnly) return;
    this.isRunningHooks = true;
    const interrupted = new Promise<void>((resolve) => {
      this.interruption.onInterrupt = resolve;
    });
    try {
      const running = hooks.run('beforeCommit', async (hook, session) => !this.isAbandoned && hook(session));
      await Promise.race([running, interrupted]);
    } catch (error) {
      this.failure ??= error ?? new Error('A beforeCommit hook has rejected without an error.');
    } finally {
      this.interruption.onInterrupt = undefined;
      this.isRunningHooks = false;
    }
  }

  /** The connection is back by then, and the outcome stands. */
  private async runHooksAfter(hooks: Hooks, decision: Decision): Promise<void> {
    const { outcome } = this;
    if (outcome === 'unknown') return;
    const isDone = outcome === 'committed' || (outcome === 'unused' && decision === 'commit' && !this.failure && !this.rollbackOnly);
    this.isAfterEnd = true;
    await hooks.run(isDone ? 'afterCommit' : 'afterRollback', (hook) => this.owner.runHook(hook));
    this.isAfterEnd = false;
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
    if (this.isAbandoned) return;
    // It waits for statements that were not awaited, in order to commit.
    this.isAbandoned = true;
    if (this.hold === undefined) this.acquisition?.giveUp(reason);
    else this.hold.stop(this.queue);
  }

  /** The ladder: what keeps the work from being committed; then COMMIT, and what its answer means. */
  private async commit(): Promise<void> {
    const { hold } = this;
    const failure =
      this.failure ?? this.statementGivenUp() ?? hold?.connection.lostBecause ?? this.openSavepoints?.leftOpen(this.abortedBy);
    if (failure !== undefined || this.rollbackOnly) {
      await this.rollback();
      if (this.rollbackOnly && this.outcome !== 'unknown') return;
      throw failure;
    }
    if (!hold?.connection.hasBegun) return;
    this.isCommitting = true;
    this.observation?.settling('commit');
    if (this.abortedBy === undefined && hold.losesNothing) {
      this.unwatchedCommit = hold.commit(undefined).catch((error) => {
        hold.dispose(error);
        this.owner.onError(error);
      });
      this.outcome = 'committed';
      this.hasStoredNothing = true;
      return;
    }
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
    const cancelAfterMs = this.interruption.reason ? 0 : CANCEL_AFTER_MS;
    this.rollbackError = await hold?.rollback(this.queue, cancelAfterMs, () => this.observation?.settling('rollback'));
    if (this.outcome === 'open' || hold?.disposedBecause) this.outcome = 'rolled back';
  }

  protected async open(level: Level): Promise<Connection> {
    try {
      const terms = this.firstUse();
      if (terms.warnAfter > 0 || areTransactionsObserved()) this.observation = new Observation(this.owner, rootOf(level).txid);
      // A listener, or a function of the options, may have ended the session: nobody would give the connection back.
      if (this.isAbandoned) throw this.interruption.reason ?? this.closed;
      const connection = this.owner.take(terms.beginning) ?? (await this.acquire(terms));
      const hold = new ConnectionHold(connection, terms);
      this.hold = hold;
      this.observation?.opened();
      this.observation?.warnAfter(terms.warnAfter, (message, ms) => this.owner.onOpenLong(message, ms, terms.warnAfter));
      hold.watch(
        () => this.streams?.movedAt ?? 0,
        () => this.interrupt(new SessionTimeoutError(terms.transactionTimeout)),
      );
      return hold.connection;
    } catch (error) {
      this.failure ??= error;
      this.observation?.stopWaiting();
      this.owner.onReleased(this);
      throw error;
    }
  }

  private acquire({ beginning, acquireTimeout }: Terms): Promise<Connection> {
    this.acquisition = new Acquisition((wish) => this.owner.connect(wish, beginning), acquireTimeout);
    return this.acquisition.connection;
  }

  private firstUse(): Terms {
    try {
      return this.owner.onFirstUse();
    } catch (error) {
      this.noteRefused(error);
      throw error;
    }
  }

  private close(because: string): void {
    this.closedBecause = because;
    // A stream that nobody reads to its end would be waited for without end.
    if (this.streams?.areOpen) this.streams.destroy(this.interruption.reason ?? new SessionClosedError(because));
  }
}

/** How long a rollback waits for the statement that still runs, before it asks the server to cancel it. */
const CANCEL_AFTER_MS = 50;
