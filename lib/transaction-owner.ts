import type { Wish } from './acquisition';
import type { Beginning } from './beginning';
import type { Connection } from './connection';
import type { SessionError, SessionOpenLongError } from './errors';
import type { Subject, TransactionMessage } from './events';
import type { Hook } from './hooks';
import type { Terms } from './resolve-options';
import type { Transaction } from './transaction';

/** Whoever a transaction is made for. */
export interface TransactionOwner extends Subject {
  /** Whether its Knex was chosen for its request, and stands for whichever is meant. */
  readonly isChosen: boolean;
  /** A connection that can be had at once. */
  take(beginning: Beginning): Connection | undefined;
  /** Takes a connection, or waits for one. */
  connect(wish: Wish, beginning: Beginning): Promise<Connection>;
  /** Throws if a transaction that has not been used can no longer be. */
  assertUsable(): void;
  /** Called before the first statement takes a connection; what it throws refuses the statement. */
  onFirstUse(): Terms;
  /** A checkpoint has come to its end, and another transaction may follow. */
  onCheckpoint(): void;
  /** Called when a hook is registered; what it throws refuses it. */
  onHook(): void;
  /** The session has set settings of its own; outside of savepoints. */
  onSet(settings: readonly [name: string, value: string][]): void;
  /** Whether statements commit by themselves, without a transaction; asked once. */
  wantsAutocommit(): boolean;
  /** Whether the work is done again because of an error; its hooks are dropped then. */
  willRepeat(error: unknown): boolean;
  /** Gives a hook a unit of work of its own; its errors are reported. */
  runHook(hook: Hook): Promise<void>;
  /** The transaction is open for longer than `warnAfter`. */
  onOpenLong(transaction: TransactionMessage, ms: number, warnAfter: number): SessionOpenLongError;
  /** Called when someone asks to be told of an interruption. */
  onSignal(): void;
  /** The transaction was interrupted while it was open: it must be settled now. */
  onInterrupt(reason: SessionError): void;
  /** It holds no connection any more, and waits for none. */
  onReleased(transaction: Transaction): void;
  /** Receives an error that no caller can. */
  onError(error: unknown): void;
}
