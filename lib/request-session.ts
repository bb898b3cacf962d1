import type { Request, Response } from 'express';
import type { Knex } from 'knex';
import type { Connection } from './connection';
import { isGone, onClose } from './disconnect';
import { isErrorHandler } from './error-response';
import { SessionClosedError, type SessionError } from './errors';
import { KnexFace, ownerOf } from './knex-face';
import type { OpenSessions } from './open-sessions';
import { type CommitAt, describe, type Limits, limitsFor, mustBeSync, type OnDisconnect, type ResolvedOptions, valueFor } from './options';
import { report } from './report';
import { canStillHold, type Exchange, type GateKeeper, ResponseGate } from './response-gate';
import { cutConnection, spareConnection } from './response-hold';
import { SessionScope } from './scope';
import { type Decision, Transaction } from './transaction';
import type { TransactionOwner } from './transaction-owner';

/** What a middleware was made with. */
export interface Mount {
  readonly knex: Knex;
  readonly options: ResolvedOptions;
  readonly openSessions: OpenSessions;
}

/**
 * Where sessions may be attached, and those that have been used, by any copy of this package. A list on each request would cost it
 * more than its session does.
 */
const REGISTRY = Symbol.for('express-knex-session.registry');
const shared = globalThis as { [REGISTRY]?: { properties: Set<string>; used: WeakMap<Response, RequestSession[]> } };
shared[REGISTRY] ??= { properties: new Set(), used: new WeakMap() };
const { properties, used } = shared[REGISTRY];

/**
 * Ties one session to one request: decides, from the response and the client, when and how the session ends.
 * Until the first statement nothing is watched and nothing is wrapped.
 */
export class RequestSession implements TransactionOwner, GateKeeper {
  readonly scope: SessionScope;
  private readonly face: KnexFace;
  private commitAt: CommitAt | undefined;
  private onDisconnect: OnDisconnect | undefined;
  private isWatched = false;
  private isClientGone = false;
  private gate: ResponseGate | undefined;
  /** Set when an error of the request has rolled the session back. */
  private failure: { readonly error: unknown; isPassedOn: boolean } | undefined;

  constructor(
    readonly mount: Mount,
    private readonly exchange: Exchange,
  ) {
    this.face = KnexFace.of(mount.knex);
    this.scope = new SessionScope(new Transaction(this));
    this.face.dress(this.scope);
  }

  /** Makes a property known, when its middleware is made. */
  static register(property: string): void {
    properties.add(property);
  }

  /** All sessions of a request: those that have been used, wherever they are now, and those that are attached to it. */
  static of(req: Request, res: Response): RequestSession[] {
    const sessions = new Set(used.get(res));
    for (const property of properties) {
      const owner = ownerOf((req as unknown as Record<string, unknown>)[property]);
      if (owner && 'mount' in owner) sessions.add(owner as RequestSession);
    }
    return [...sessions];
  }

  // What the transaction asks for.

  connect(isWanted: () => boolean): Promise<Connection> {
    return this.face.connect(this.scope, isWanted);
  }

  assertUsable(): void {
    const { req, res } = this.exchange;
    // The end first: every response is destroyed after it.
    if (res.writableEnded) throw new SessionClosedError(RESPONSE_HAS_ENDED);
    if (isGone(req, res) && !this.letsHandlerFinish) throw new SessionClosedError(CLIENT_HAS_GONE);
  }

  onFirstUse(): Limits {
    this.assertUsable();
    const { req, res } = this.exchange;
    const { options, openSessions } = this.mount;
    used.set(res, [...(used.get(res) ?? []), this]);
    let limits: Limits;
    try {
      // Before it is needed, in a listener: what it throws would end the process there.
      this.onDisconnect ??= valueFor('onDisconnect', options.onDisconnect, req);
      this.watch();
      limits = limitsFor(options, req);
      this.commitAt = valueFor('commitAt', options.commitAt, req);
      openSessions.join(this.scope.transaction);
    } catch (error) {
      // The handler may swallow it, and must not answer with a success then.
      this.gate = ResponseGate.keep(this.exchange, this);
      throw error;
    }
    if (this.commitAt === 'finish') {
      res.once('finish', () => this.settleAfterFinish());
      if (isGone(req, res)) this.settleAtEnd();
    } else {
      const letsBytesFlow = this.commitAt === 'end';
      if (!canStillHold(res, letsBytesFlow)) {
        throw new SessionClosedError(letsBytesFlow ? RESPONSE_IS_UNDER_WAY : RESPONSE_HAS_BEGUN);
      }
      this.gate = ResponseGate.keep(this.exchange, this);
    }
    return limits;
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

  onReleased(): void {
    this.mount.openSessions.leave(this.scope.transaction);
  }

  onError(error: unknown): void {
    this.report(error);
  }

  // What the gate asks for.

  get letsBytesFlow(): boolean {
    // With a stream of its own under way, the response would wait for the session, and the session for the response.
    return this.commitAt === 'end' || this.scope.transaction.hasOpenStream;
  }

  async settle(isBeginning: boolean, hasFailed: boolean): Promise<void> {
    if (this.failure) {
      await this.settleFailed(this.failure);
      return;
    }
    const { interruptedBy } = this.scope.transaction;
    if (interruptedBy && !this.isClientGone) {
      await this.scope.settle('rollback', RESPONSE_HAS_ENDED).catch(() => {});
      throw interruptedBy;
    }
    const because = isBeginning ? RESPONSE_HAS_BEGUN : RESPONSE_HAS_ENDED;
    let decision: Decision;
    try {
      decision = hasFailed ? 'rollback' : this.decide();
    } catch (error) {
      await this.scope.settle('rollback', because).catch(() => {});
      throw error;
    }
    const settled = this.scope.settle(decision, because);
    // A session that the handler failed to commit itself: its own answer to that is kept, if it is no success.
    await (decision === 'commit' ? settled : settled.catch(() => {}));
  }

  report(error: unknown): void {
    report(this.mount.knex, this.mount.options.onError, error, this.exchange.req);
  }

  /**
   * An error is on its way to the error handlers: rolls back, unless the response has been decided before.
   *
   * @returns nothing if there is nothing to wait for; `'decided'` if the response was; `'passed on'` if the old handler has tried to send
   *   a response meanwhile, and there is none left for the error
   */
  fail(error: unknown): Promise<'decided' | 'passed on' | 'rolled back'> | undefined {
    const { gate } = this;
    // What the gate itself passes on goes on at once: an error of the old handler must not overtake it.
    if (gate?.settling) return isErrorHandler(this.exchange.res) ? undefined : gate.settling.then(() => 'decided');
    if (this.commitAt === 'finish' && this.exchange.res.writableEnded) return undefined;
    const rolledBack = this.scope.fail(error, AN_ERROR_WAS_PASSED_ON).catch(() => {});
    if (!this.scope.transaction.isUsed) return undefined;
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
    const answer: unknown = this.mount.options.shouldCommit(req, res);
    if (typeof answer === 'boolean') return answer ? 'commit' : 'rollback';
    throw new TypeError(`Expected \`shouldCommit\` to return true or false, got ${describe(answer)}.${mustBeSync(answer)}`);
  }

  /** Whether a client that leaves means nothing to the work. */
  private get letsHandlerFinish(): boolean {
    this.onDisconnect ??= valueFor('onDisconnect', this.mount.options.onDisconnect, this.exchange.req);
    return this.onDisconnect === 'finish';
  }

  private watch(): void {
    if (this.isWatched) return;
    this.isWatched = true;
    const { req, res } = this.exchange;
    if (isGone(req, res)) this.onClose();
    else onClose(req, res, () => this.onClose());
  }

  private onClose(): void {
    const { res } = this.exchange;
    const { transaction } = this.scope;
    // Once the response is decided upon, a COMMIT is left to finish; after the response, there is nothing left to do.
    if (this.gate?.settling || transaction.isSettled) return;
    if (res.writableFinished && (this.commitAt === 'finish' || !transaction.isUsed)) return;
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
    this.settle(false, false).catch((error) => this.report(error));
  }
}

const RESPONSE_HAS_ENDED =
  'the response has ended. Await every statement before you send the response; for work after it, use withSession().';
const RESPONSE_HAS_BEGUN =
  "the response has begun, and the session ends before its first byte leaves. Pass { commitAt: 'end' } to keep it open until the response ends.";
const RESPONSE_IS_UNDER_WAY =
  'the response is under way, and its end can no longer be held: it has declared a length, or has none. Run the first statement before its head leaves.';
const CLIENT_HAS_GONE =
  "the client has disconnected, and its work was rolled back. Pass { onDisconnect: 'finish' } if it must be done all the same.";
const AN_ERROR_WAS_PASSED_ON =
  'an error went to the error handlers, and has rolled it back. For work in an error handler, use withSession().';
