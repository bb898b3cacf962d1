import type { Request } from 'express';
import type { Knex } from 'knex';
import type { Wish } from './acquisition';
import { assertKnex } from './assert-knex';
import { sessionsOn } from './attached-sessions';
import type { Beginning } from './beginning';
import { AN_ERROR_WAS_PASSED_ON } from './closed-because';
import type { Connection } from './connection';
import { mustBeSync, routeOf } from './describe';
import { diagnoseBody, watchPool } from './diagnostics';
import { type SessionError, SessionOpenLongError } from './errors';
import type { TransactionMessage } from './events';
import type { Hook } from './hooks';
import { KnexFace } from './knex-face';
import type { OpenSessions } from './open-sessions';
import { report } from './report';
import type { FixedTerms, ResolvedOptions, Terms } from './resolve-options';
import type { Exchange } from './response-gate';
import { SessionScope } from './scope';
import type { Session } from './session';
import type { SessionPolicy } from './session-policy';
import { Transaction } from './transaction';
import type { TransactionOwner } from './transaction-owner';
import { runHook } from './unit-of-work';

/** What a middleware was made with. */
export interface Mount {
  /** Unless it is chosen for each request. */
  readonly knex: Knex | undefined;
  readonly choose: ((req: Request) => Knex) | undefined;
  readonly options: ResolvedOptions;
  /** The same, as a session begins with them. */
  readonly policy: SessionPolicy;
  readonly openSessions: OpenSessions;
  /** Whether mistakes are told that do no harm yet. */
  readonly isDiagnosing: boolean;
}

/** A request's session as its middleware has made it: on which Knex, and under which options. */
export abstract class MountedSession implements TransactionOwner {
  scope!: SessionScope;
  knex!: Knex;
  protected face!: KnexFace;
  protected policy: SessionPolicy;
  /** Set when an error went to the error handlers before its Knex was chosen. */
  protected failedBefore = false;
  private fixed: FixedTerms | undefined;

  constructor(
    readonly mount: Mount,
    protected readonly exchange: Exchange,
  ) {
    this.policy = mount.policy;
    if (mount.knex) this.open(mount.knex);
  }

  abstract assertUsable(): void;
  abstract onFirstUse(): Terms;
  abstract onCheckpoint(): void;
  abstract onHook(): void;
  abstract willRepeat(error: unknown): boolean;
  abstract onSignal(): void;
  abstract onInterrupt(reason: SessionError): void;
  abstract readonly bytesHeld: number;

  get session(): Session {
    return this.scope.face;
  }

  get request(): Request {
    return this.exchange.req;
  }

  get isChosen(): boolean {
    return this.mount.choose !== undefined;
  }

  /** Whether it has its Knex. */
  get isOpen(): boolean {
    return (this.scope as SessionScope | undefined) !== undefined;
  }

  /** Itself, on the Knex that is chosen now if that has not happened yet. @throws TypeError if none was chosen */
  get opened(): this {
    if (this.isOpen) return this;
    const knex: unknown = this.mount.choose?.(this.exchange.req);
    mustBeSync(knex);
    assertKnex(knex, 'the function `knex` to return a Knex instance');
    this.open(knex);
    if (this.failedBefore) void this.scope.fail(undefined, AN_ERROR_WAS_PASSED_ON).catch(() => {});
    return this;
  }

  private open(knex: Knex): void {
    this.knex = knex;
    this.face = KnexFace.of(knex);
    this.scope = new SessionScope(new Transaction(this));
    this.face.dress(this.scope);
    this.noteFirstUse();
    if (this.mount.isDiagnosing) {
      this.scope.transaction.writes = 0;
      watchPool(knex, holdsConnection);
    }
  }

  take(beginning: Beginning): Connection | undefined {
    return this.mount.isDiagnosing ? undefined : this.face.take(this.scope, beginning);
  }

  connect(wish: Wish, beginning: Beginning): Promise<Connection> {
    if (this.mount.isDiagnosing) diagnoseBody(this.exchange.req, () => this.scope.transaction.isConnected);
    return this.face.connect(this.scope, wish, beginning);
  }

  protected get options(): ResolvedOptions {
    return this.policy.options;
  }

  /** What the options' functions have returned holds for all of its transactions, and for its hooks. @param others what a hook has set */
  protected terms(others: readonly [string, string][] = []): Terms {
    this.fixed ??= this.policy.fixedFor(this.exchange.req);
    return this.policy.termsOf(this.fixed, others);
  }

  onSet(settings: readonly [string, string][]): void {
    this.policy = this.policy.adding(settings);
  }

  wantsAutocommit(): boolean {
    return !this.face.outer && this.policy.wantsAutocommit(this.exchange.req);
  }

  runHook(hook: Hook): Promise<void> {
    const { knex, mount, isChosen } = this;
    const unit = {
      knex,
      isChosen,
      terms: (own: readonly [string, string][]): Terms => this.terms(own),
      openSessions: mount.openSessions,
      request: this.request,
      isFirstUseNoted: this.options.warnAfter !== 0,
      report: (error: unknown) => this.report(error),
      isAutocommit: this.scope.transaction.isAutocommit,
    };
    return runHook(unit, hook);
  }

  /** For `warnAfter`, before its first use. */
  protected noteFirstUse(): void {
    if (this.options.warnAfter !== 0) this.face.noteFirstUse(this.scope);
  }

  onOpenLong({ lastStatement }: TransactionMessage, ms: number, warnAfter: number): SessionOpenLongError {
    const error = new SessionOpenLongError(warnAfter, routeOf(this.request), ms, lastStatement, this.face.firstUseOf(this.scope));
    this.report(error);
    return error;
  }

  onReleased(transaction: Transaction): void {
    this.mount.openSessions.leave(transaction);
  }

  onError(error: unknown): void {
    this.report(error);
  }

  report(error: unknown): void {
    report(this.knex, this.options.onError, error, this.exchange.req);
  }
}

function holdsConnection(req: Request, knex: Knex): boolean {
  return sessionsOn(req).some((session) => session.knex === knex && session.scope.transaction.isConnected);
}
