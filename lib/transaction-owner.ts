import type { Connection } from './connection';
import type { SessionError } from './errors';
import type { Limits } from './options';

/** Whoever a transaction is made for. */
export interface TransactionOwner {
  /** Takes a connection. @param isWanted whether anybody still waits for it */
  connect(isWanted: () => boolean): Promise<Connection>;
  /** Throws if a transaction that has not been used can no longer be. */
  assertUsable(): void;
  /** Called before the first statement takes a connection; what it throws refuses the statement. @returns how long it may wait for what */
  onFirstUse(): Limits;
  /** Called when someone asks to be told of an interruption. */
  onSignal(): void;
  /** The transaction was interrupted while it was open: it must be settled now. */
  onInterrupt(reason: SessionError): void;
  /** It holds no connection any more, and waits for none. */
  onReleased(): void;
  /** Receives an error that no caller can. */
  onError(error: unknown): void;
}
