import { type Channel, channel } from 'node:diagnostics_channel';
import type { Request } from 'express';
import { Deadline, now } from './deadline';
import { SessionClosedError, type SessionOpenLongError } from './errors';
import type { Session } from './session';

/**
 * Why a transaction ended as it did.
 *
 * - `'response'`: its response, or the end of the work of `withSession()`.
 * - `'commit'`, `'rollback'`, `'checkpoint'`: the handler has called that.
 * - `'rollback only'`: the handler has called `setRollbackOnly()`.
 * - `'error'`: an error was passed on; or COMMIT, or a statement before it, has failed.
 * - `'disconnect'`: the client has gone.
 * - `'timeout'`: it was open for longer than `transactionTimeout`.
 * - `'shutdown'`: `drain()` did not wait any longer.
 *
 * @example
 * const isTheirFault = (reason: SettleReason | undefined) => reason === 'disconnect';
 */
export type SettleReason =
  | 'response'
  | 'commit'
  | 'rollback'
  | 'checkpoint'
  | 'rollback only'
  | 'error'
  | 'disconnect'
  | 'timeout'
  | 'shutdown';

/** What all messages of {@link SessionChannels} have. */
export interface SessionMessage {
  /** The session: `req.session`, or what `withSession()` has given. */
  readonly session: Session;
  /** The request; undefined in `withSession()`. */
  readonly request: Request | undefined;
}

/**
 * One transaction of a session: the message of `acquire`, `open`, `settle` and `settled`, **the same object in all of them**, so that what
 * a subscriber keeps about it can be found again (in a WeakMap). What is not known yet is undefined.
 *
 * @example
 * sessionChannels.settled.subscribe(({ request, outcome, reason, waitedMs, heldMs, statements }) => {
 *   log.info({ url: request?.originalUrl, outcome, reason, waitedMs, heldMs, statements });
 * });
 */
export interface TransactionMessage extends SessionMessage {
  /** That of its statements in Knex's events (`__knexTxId`); shared by the transactions before and after a checkpoint. */
  readonly id: string;
  /** When its first statement asked for a connection, as `performance.now()` tells the time. */
  readonly startedAt: number;
  /** For how long it has waited for the connection, in ms; without one, until it gave up. */
  readonly waitedMs: number | undefined;
  /** For how long it has held the connection, in ms. */
  readonly heldMs: number | undefined;
  /** Statements that were sent: SAVEPOINT, RELEASE and ROLLBACK TO included, BEGIN, COMMIT and ROLLBACK not. */
  readonly statements: number;
  /** The text of the last of them, without its values. */
  readonly lastStatement: string | undefined;
  /** What is sent at its end. */
  readonly decision: 'commit' | 'rollback' | undefined;
  /** What has become of it. `'unused'`: it had no connection, or BEGIN has failed. */
  readonly outcome: 'committed' | 'rolled back' | 'unknown' | 'unused' | undefined;
  /** Why. */
  readonly reason: SettleReason | undefined;
  /** The error that has rolled it back, or that its COMMIT has failed with. */
  readonly error: unknown;
  /** Bytes of the response's body that were held back until its end. */
  readonly bytesHeld: number;
}

/** Something was asked of a session after its end, and was refused. */
export interface LateUseMessage extends SessionMessage {
  /** What the caller was told; its stack shows who it was. */
  readonly error: SessionClosedError;
}

/** A transaction is open for longer than `warnAfter`. */
export interface OpenLongMessage extends SessionMessage {
  /** The transaction, as far as it is known. */
  readonly transaction: TransactionMessage;
  /** What `onError` is told. */
  readonly error: SessionOpenLongError;
}

/** A connection of the pool was destroyed in place of being given back. */
export interface ConnectionDestroyedMessage extends SessionMessage {
  /** Why: mostly an error. */
  readonly reason: unknown;
}

/** A channel of `node:diagnostics_channel`, with the type of its messages. What a listener throws ends the process: Node's rule. */
export interface SessionChannel<Message> {
  /** What `subscribe` of `node:diagnostics_channel` calls it. */
  readonly name: string | symbol;
  /** Whether anybody is told. */
  readonly hasSubscribers: boolean;

  /**
   * Calls back for each message, at once, in the asynchronous context of whoever has caused it.
   *
   * @example
   * sessionChannels.late.subscribe(({ request, error }) => log.warn({ url: request?.originalUrl, at: error.stack }));
   */
  subscribe(listener: (message: Message, name: string | symbol) => void): void;

  /**
   * Calls back no more.
   *
   * @returns whether it was subscribed
   * @example
   * const count = () => {
   *   settledSoFar++;
   * };
   * let settledSoFar = 0;
   * sessionChannels.settled.subscribe(count);
   * sessionChannels.settled.unsubscribe(count);
   */
  unsubscribe(listener: (message: Message, name: string | symbol) => void): boolean;
}

/** The type of {@link sessionChannels}. */
export interface SessionChannels {
  /** `express-knex-session.session.acquire`: the first statement of a transaction asks for a connection. */
  readonly acquire: SessionChannel<TransactionMessage>;
  /** `express-knex-session.session.open`: it has its connection; BEGIN goes with the first statement. */
  readonly open: SessionChannel<TransactionMessage>;
  /** `express-knex-session.session.settle`: COMMIT or ROLLBACK is about to be sent. */
  readonly settle: SessionChannel<TransactionMessage>;
  /** `express-knex-session.session.settled`: it has ended, and its connection is given back. Where COMMIT is waited for, the response has not left yet. */
  readonly settled: SessionChannel<TransactionMessage>;
  /** `express-knex-session.session.late`: a session was used after its end. */
  readonly late: SessionChannel<LateUseMessage>;
  /** `express-knex-session.session.long`: a transaction is open for longer than `warnAfter`. */
  readonly long: SessionChannel<OpenLongMessage>;
  /** `express-knex-session.connection.destroyed`: a connection was not given back. */
  readonly destroyed: SessionChannel<ConnectionDestroyedMessage>;
}

const named = <Message>(name: string) => channel(`express-knex-session.${name}`) as Channel<Message, Message> & SessionChannel<Message>;

const acquire = named<TransactionMessage>('session.acquire');
const open = named<TransactionMessage>('session.open');
const settle = named<TransactionMessage>('session.settle');
const settled = named<TransactionMessage>('session.settled');
const late = named<LateUseMessage>('session.late');
const long = named<OpenLongMessage>('session.long');
const destroyed = named<ConnectionDestroyedMessage>('connection.destroyed');

/**
 * What sessions do, on channels of `node:diagnostics_channel`: for logs, metrics and traces.
 *
 * 1. Each transaction that wants a connection is told of by `acquire`, `open`, `settle` and `settled`, in this order. One that gets none
 *    has no `open`; one that has nothing to end (BEGIN failed, the connection is lost) has no `settle`. `settled` always comes.
 * 2. A session that runs no statement is in none of them; nor are savepoints. Sessions with `transaction: false` are in `late` and
 *    `destroyed` only.
 * 3. Subscribe before the first request: a transaction is followed only if there was a subscriber when it began, or `warnAfter` is on.
 * 4. Without subscribers they cost nothing. The names are part of the API, also for `subscribe(name, ...)` of `node:diagnostics_channel`.
 *
 * @example
 * sessionChannels.settled.subscribe(({ request, heldMs }) => {
 *   if (heldMs !== undefined && heldMs > 1_000) log.warn({ url: request?.originalUrl, heldMs });
 * });
 */
export const sessionChannels: SessionChannels = { acquire, open, settle, settled, late, long, destroyed };

/** Whose work is observed. */
export interface Subject extends SessionMessage {
  /** See {@link TransactionMessage.bytesHeld}. */
  readonly bytesHeld: number;
}

/** Whether anybody is told of transactions. */
export function areTransactionsObserved(): boolean {
  return acquire.hasSubscribers || open.hasSubscribers || settle.hasSubscribers || settled.hasSubscribers;
}

/** Follows a transaction for those who have subscribed, and for `warnAfter`. */
export class Observation {
  private readonly message: { -readonly [Name in keyof TransactionMessage]: TransactionMessage[Name] };
  private readonly limit = new Deadline();
  private openedAt: number | undefined;

  constructor(
    private readonly subject: Subject,
    id: string,
  ) {
    const { session, request } = subject;
    this.message = {
      session,
      request,
      id,
      startedAt: now(),
      waitedMs: undefined,
      heldMs: undefined,
      statements: 0,
      lastStatement: undefined,
      decision: undefined,
      outcome: undefined,
      reason: undefined,
      error: undefined,
      bytesHeld: 0,
    };
    acquire.publish(this.message);
  }

  /** It has a connection. */
  opened(): void {
    this.stopWaiting();
    this.openedAt = now();
    open.publish(this.message);
  }

  stopWaiting(): void {
    this.message.waitedMs ??= now() - this.message.startedAt;
  }

  /** @param tell called once, if it is open for longer than this */
  warnAfter(ms: number, tell: (message: TransactionMessage, ms: number) => SessionOpenLongError): void {
    this.limit.set(ms, () => {
      const { message } = this;
      const { session, request } = message;
      const error = tell(message, now() - (this.openedAt as number));
      long.publish({ session, request, transaction: message, error });
    });
  }

  noteStatement(text: string): void {
    this.message.statements++;
    this.message.lastStatement = text;
  }

  settling(decision: 'commit' | 'rollback'): void {
    this.message.decision = decision;
    settle.publish(this.message);
  }

  settled(outcome: 'committed' | 'rolled back' | 'unknown' | 'unused', reason: SettleReason, error: unknown): void {
    this.limit.clear();
    const { message } = this;
    this.stopWaiting();
    if (this.openedAt !== undefined) message.heldMs = now() - this.openedAt;
    Object.assign(message, { outcome, reason, error, bytesHeld: this.subject.bytesHeld });
    settled.publish(message);
  }
}

/** @param error whatever a statement was refused with */
export function publishLateUse({ session, request }: SessionMessage, error: unknown): void {
  if (late.hasSubscribers && error instanceof SessionClosedError) late.publish({ session, request, error });
}

export function publishDestroyed({ session, request }: SessionMessage, reason: unknown): void {
  if (destroyed.hasSubscribers) destroyed.publish({ session, request, reason });
}
