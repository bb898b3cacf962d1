import { noteUsed, replace } from './attached-sessions';
import type { Attempt } from './attempt';
import {
  AN_ERROR_WAS_PASSED_ON,
  ANOTHER_ATTEMPT,
  CLIENT_HAS_GONE,
  OPTIONS_CAME_LATE,
  RESPONSE_HAS_BEGUN,
  RESPONSE_HAS_ENDED,
  RESPONSE_IS_UNDER_WAY,
} from './closed-because';
import { nextTurn } from './deadline';
import { describe, mustBeSync } from './describe';
import { diagnoseRollback } from './diagnostics';
import { isGone, onClose } from './disconnect';
import { isErrorHandler } from './error-response';
import { SessionClosedError, SessionError } from './errors';
import { MountedSession } from './mounted-session';
import type { CommitAt, OnDisconnect } from './options';
import { type ResolvedOptions, type Terms, valueFor } from './resolve-options';
import { canStillHold, type GateKeeper, ResponseGate } from './response-gate';
import { cutConnection, spareConnection } from './response-hold';
import type { SessionPolicy } from './session-policy';
import type { Decision, Transaction } from './transaction';

/**
 * Ties one session to one request: decides, from the response and the client, when and how the session ends.
 * Until the first statement nothing is watched and nothing is wrapped.
 */
export class RequestSession extends MountedSession implements GateKeeper {
  /** The run of a retryable handler that it belongs to. */
  private attempt: Attempt | undefined;
  private given: { readonly policy: SessionPolicy; readonly rollbackOnly: Transaction['rollbackOnly'] } | undefined;
  private commitAt: CommitAt | undefined;
  private onDisconnect: OnDisconnect | undefined;
  private isWatched = false;
  private unwatch: (() => void) | undefined;
  private isEngaged = false;
  /** Set when the response could not be held any more. */
  private refusedBecause: string | undefined;
  private isClientGone = false;
  private gate: ResponseGate | undefined;
  /** Set when an error of the request has rolled the session back. */
  private failure: { readonly error: unknown; isPassedOn: boolean } | undefined;

  // What the transaction asks for.

  assertUsable(): void {
    const { req, res } = this.exchange;
    if (this.attempt?.isOver) throw new SessionClosedError(ANOTHER_ATTEMPT);
    // The end first: every response is destroyed after it.
    if (res.writableEnded && !this.scope.transaction.isRunningHooks) throw new SessionClosedError(RESPONSE_HAS_ENDED);
    if (isGone(req, res) && !res.writableFinished && !this.letsHandlerFinish) throw new SessionClosedError(CLIENT_HAS_GONE);
  }

  onFirstUse(): Terms {
    const { transaction } = this.scope;
    if (transaction.isAutocommit) return this.terms();
    this.assertUsable();
    return this.engage(() => {
      const terms = this.terms();
      this.mount.openSessions.join(transaction);
      return terms;
    });
  }

  onCheckpoint(): void {
    // While COMMIT was under way, it was left to finish.
    const { req, res } = this.exchange;
    if (this.isWatched && isGone(req, res)) this.onClose();
  }

  onHook(): void {
    this.engage(() => {});
  }

  get bytesHeld(): number {
    return this.gate?.bytesHeld ?? 0;
  }

  willRepeat(error: unknown): boolean {
    // By the response: a handler that commits by itself may take the error as it is.
    return this.gate?.settling !== undefined && (this.attempt?.takes(error) ?? false);
  }

  // What an attempt asks for.

  /** Whether the error handlers have had the error from the session itself. */
  hasTold(error: unknown): boolean {
    return this.gate !== undefined && this.isOpen && this.scope.transaction.interruptedBy === error;
  }

  /** Whether anything has been asked of it. */
  get hasWork(): boolean {
    return this.isEngaged || (this.isOpen && this.scope.outcome === 'committed');
  }

  /** Whether something is stored, or may be. */
  get hasLastingWork(): boolean {
    if (!this.isOpen) return false;
    const { outcome, isAutocommit, isSettled, hasStoredNothing, hooks } = this.scope.transaction;
    if (this.scope.hasCheckpoint || isAutocommit || outcome === 'unknown') return true;
    return outcome === 'committed' ? !hasStoredNothing || hooks !== undefined : outcome === 'open' && isSettled;
  }

  /** Whether bytes of the response have left; undefined if it is not watched. */
  get hasHandedOn(): boolean | undefined {
    return this.gate && (this.gate.hasHandedOn || this.gate.hadHead);
  }

  /** What was asked of it before holds for each attempt. */
  begin(attempt: Attempt): void {
    this.attempt = attempt;
    this.given = { policy: this.policy, rollbackOnly: this.isOpen ? this.scope.transaction.rollbackOnly : undefined };
  }

  /** Settles with the response, if that has been decided upon. */
  get decided(): Promise<void> | undefined {
    return this.gate?.settling;
  }

  /** Rolls back an attempt that has failed. Never rejects. */
  async giveUp(error: unknown): Promise<void> {
    if (!this.isOpen) return;
    this.scope.transaction.hooks = undefined;
    await this.scope.fail(error, ANOTHER_ATTEMPT).catch(() => {});
    this.gate?.takeBack();
    this.unwatch?.();
  }

  /** A session like this one before its first use, in its place. */
  another(): RequestSession {
    const other = new RequestSession(this.mount, this.exchange);
    if (this.given) other.policy = this.given.policy;
    if (other.isOpen) other.noteFirstUse();
    replace(this, other, this.exchange.req, this.exchange.res);
    if (this.given?.rollbackOnly) other.opened.scope.transaction.rollbackOnly = this.given.rollbackOnly;
    return other;
  }

  // What the gate asks for, when it has failed.

  retry(error: unknown): (() => void) | undefined {
    const { attempt } = this;
    return attempt?.takes(error) ? () => void attempt.repeat(error) : undefined;
  }

  /** @throws SessionError `ERR_SESSION_OPTIONS` if the first statement has come before */
  changeOptions(options: Partial<ResolvedOptions>): void {
    if (this.isEngaged || (this.isOpen && (this.scope.isDecided || this.scope.transaction.isSettled))) {
      throw new SessionError('ERR_SESSION_OPTIONS', OPTIONS_CAME_LATE);
    }
    this.policy = this.policy.with(options);
    if (this.isOpen) this.noteFirstUse();
  }

  /** With the first statement, or hook: from now on the response waits for the session. @param start what may still refuse it */
  private engage<T>(start: () => T): T {
    if (this.refusedBecause) throw new SessionClosedError(this.refusedBecause);
    if (this.isEngaged) return start();
    const { req, res } = this.exchange;
    let started: T;
    try {
      // Before it is needed, in a listener: what it throws would end the process there.
      this.onDisconnect ??= valueFor('onDisconnect', this.options.onDisconnect, req);
      this.watch();
      this.commitAt = valueFor('commitAt', this.options.commitAt, req);
      started = start();
    } catch (error) {
      // The handler may swallow it, and must not answer with a success then.
      this.gate = ResponseGate.keep(this.exchange, this);
      throw error;
    } finally {
      this.isEngaged = true;
      noteUsed(this, res);
    }
    if (this.commitAt === 'finish') {
      res.once('finish', () => this.settleAfterFinish());
      if (isGone(req, res)) this.settleAtEnd();
    } else {
      const letsBytesFlow = this.commitAt === 'end';
      if (!canStillHold(res, letsBytesFlow)) {
        this.refusedBecause = letsBytesFlow ? RESPONSE_IS_UNDER_WAY : RESPONSE_HAS_BEGUN;
        throw new SessionClosedError(this.refusedBecause);
      }
      this.gate = ResponseGate.keep(this.exchange, this);
    }
    return started;
  }

  onSignal(): void {
    if (!this.letsHandlerFinish) this.watch();
  }

  onInterrupt(reason: SessionError): void {
    if (this.isClientGone) {
      this.scope.settle('rollback', CLIENT_HAS_GONE).catch(() => {});
      return;
    }
    const { res } = this.exchange;
    this.scope.fail(reason, 'it was given up, and its work was rolled back. See `cause`.').catch(() => {});
    if (this.commitAt === 'finish' && !res.headersSent) this.gate = ResponseGate.keep(this.exchange, this);
    if (this.gate) this.gate.refuse(reason, this);
    else {
      this.report(reason);
      if (!res.writableEnded) cutConnection(res);
    }
  }

  // What the gate asks for.

  get letsBytesFlow(): boolean {
    // With a stream of its own under way, the response would wait for the session, and the session for the response.
    return this.commitAt === 'end' || this.scope.transaction.hasOpenStream;
  }

  settle(isBeginning: boolean, failedBefore?: { readonly error: unknown }): Promise<void> {
    const { scope } = this;
    if (failedBefore && this.attempt?.takes(failedBefore.error)) scope.transaction.hooks = undefined;
    if (this.failure) return this.settleFailed(this.failure);
    const { interruptedBy } = scope.transaction;
    if (interruptedBy && !this.isClientGone) return this.settleInterrupted(interruptedBy);
    const because = isBeginning ? RESPONSE_HAS_BEGUN : RESPONSE_HAS_ENDED;
    const giveUp = (error: unknown): Promise<void> =>
      scope.settle('rollback', because, undefined, { reason: 'error', error }).catch(() => {});
    if (failedBefore) return giveUp(failedBefore.error);
    let decision: Decision;
    try {
      decision = this.decide();
      if (this.mount.isDiagnosing && decision === 'rollback') diagnoseRollback(this.exchange, scope.transaction, this.options);
    } catch (error) {
      return giveUp(error).then(() => Promise.reject(error));
    }
    const settled = scope.settle(decision, because);
    // A session that the handler failed to commit itself: its own answer to that is kept, if it is no success.
    return decision === 'commit' ? settled : settled.catch(() => {});
  }

  private async settleInterrupted(reason: SessionError): Promise<void> {
    await this.scope.settle('rollback', RESPONSE_HAS_ENDED).catch(() => {});
    // The handler first, which hears of it by its statement: behind the error handlers, its rejection would be told once more, by Express.
    await nextTurn();
    throw reason;
  }

  /**
   * An error is on its way to the error handlers: rolls back, unless the response has been decided before.
   *
   * @returns nothing if there is nothing to wait for; `'decided'` if the response was; `'passed on'` if the old handler has tried to send
   *   a response meanwhile, and there is none left for the error
   */
  fail(error: unknown): Promise<'decided' | 'passed on' | 'rolled back'> | undefined {
    if (!this.isOpen) {
      this.failedBefore = true;
      return undefined;
    }
    const { gate } = this;
    // What the gate itself passes on goes on at once: an error of the old handler must not overtake it.
    if (gate?.settling) {
      // What has interrupted the session has been passed on; the handler hears of it by its statement, and may pass it on again.
      const isKnown = error === this.scope.transaction.interruptedBy;
      return isErrorHandler(this.exchange.res) ? undefined : gate.settling.then(() => (isKnown ? 'passed on' : 'decided'));
    }
    if (this.commitAt === 'finish' && this.exchange.res.writableEnded) return undefined;
    const rolledBack = this.scope.fail(error, AN_ERROR_WAS_PASSED_ON).catch(() => {});
    if (!this.isEngaged) return undefined;
    const failure = { error, isPassedOn: false };
    this.failure = failure;
    return rolledBack.then(async () => {
      if (gate?.settling) {
        await gate.settling;
        return 'passed on';
      }
      failure.isPassedOn = true;
      gate?.fail();
      spareConnection(this.exchange.req, this.exchange.res);
      return 'rolled back';
    });
  }

  /** A response to a request that has failed. */
  private async settleFailed({ error, isPassedOn }: { error: unknown; isPassedOn: boolean }): Promise<void> {
    const { res } = this.exchange;
    const isTheirs = isErrorHandler(res);
    await this.scope.settle('rollback', AN_ERROR_WAS_PASSED_ON).catch(() => {});
    if (!isPassedOn) {
      if (this.decide() === 'commit') throw error;
      // The old handler has answered with an error of its own, and has left nothing to answer for the first.
      this.report(error);
      return;
    }
    // Error handlers answer as they like. A success of anybody else would be a lie.
    if (!isTheirs && this.decide() === 'commit') cutConnection(res);
  }

  private decide(): Decision {
    const { req, res } = this.exchange;
    const answer: unknown = this.options.shouldCommit(req, res);
    if (typeof answer === 'boolean') return answer ? 'commit' : 'rollback';
    throw new TypeError(`Expected \`shouldCommit\` to return true or false, got ${describe(answer)}.${mustBeSync(answer)}`);
  }

  /** Whether a client that leaves means nothing to the work. */
  private get letsHandlerFinish(): boolean {
    this.onDisconnect ??= valueFor('onDisconnect', this.options.onDisconnect, this.exchange.req);
    return this.onDisconnect === 'finish';
  }

  private watch(): void {
    if (this.isWatched) return;
    this.isWatched = true;
    const { req, res } = this.exchange;
    if (isGone(req, res)) this.onClose();
    else this.unwatch = onClose(req, res, () => this.onClose());
  }

  private onClose(): void {
    const { res } = this.exchange;
    const { transaction } = this.scope;
    // Once the response is decided upon, a COMMIT is left to finish; after the response, there is nothing left to do.
    const isDecided = this.gate?.settling !== undefined || transaction.isSettled;
    if (isDecided && !transaction.isRunningHooks) return;
    if (this.isEngaged ? res.writableFinished && this.commitAt === 'finish' : res.writableEnded) return;
    if (this.letsHandlerFinish) {
      if (this.commitAt === 'finish') this.settleAtEnd();
      return;
    }
    this.isClientGone = true;
    transaction.interrupt(new SessionClosedError(CLIENT_HAS_GONE));
  }

  /** A response that nobody receives may never finish, but the handler ends it. */
  private settleAtEnd(): void {
    this.gate ??= ResponseGate.keep(this.exchange, this);
  }

  private settleAfterFinish(): void {
    if (this.scope.transaction.interruptedBy) return;
    this.settle(false).catch((error) => this.report(error));
  }
}
