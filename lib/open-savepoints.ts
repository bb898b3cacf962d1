import { SessionClosedError, SessionError } from './errors';

/** Where a statement belongs: the session itself, or a savepoint in it. */
export interface Level {
  readonly txid: string;
  readonly parent: Level | undefined;
  /** Whether this savepoint, or one around it, has ended; the session's own end is known to its transaction. */
  readonly isOver: boolean;
  /** Set on a savepoint while which statements of another level have run. */
  holdsOthers?: boolean;
  /** Tells whoever waits for a savepoint that it will never end. */
  abandon?(error: unknown): void;
}

/** The savepoints of a transaction that were begun and have not ended. */
export class OpenSavepoints {
  private readonly open = new Set<Level>();

  get areOpen(): boolean {
    return this.open.size > 0;
  }

  begun(savepoint: Level): void {
    this.open.add(savepoint);
  }

  released(savepoint: Level): void {
    this.open.delete(savepoint);
  }

  /** @returns the error if work of others was rolled back with it */
  rolledBack(savepoint: Level): SessionError | undefined {
    for (const open of this.open) if (isWithin(open, savepoint)) this.open.delete(open);
    if (!savepoint.holdsOthers) return undefined;
    return new SessionError(
      'ERR_SAVEPOINT_OPEN',
      'Statements of the session ran while a savepoint (session.transaction()) was open, and were rolled back with it. ' +
        'Await it before you go on, or run them on the transaction that it passes to its callback.',
    );
  }

  /** The session has ended. */
  abandon(error: unknown): void {
    for (const savepoint of this.open) savepoint.abandon?.(error);
  }

  /** A statement that runs while a savepoint of another level is open lives and dies with that savepoint. */
  noteStatement(level: Level): void {
    for (const savepoint of this.open) {
      if (!isWithin(level, savepoint)) savepoint.holdsOthers = true;
    }
  }

  /** @returns the error if a savepoint has not ended by the end of the session */
  leftOpen(abortedBy: unknown): SessionError | undefined {
    if (!this.areOpen) return undefined;
    return new SessionError(
      'ERR_SAVEPOINT_OPEN',
      'A savepoint (session.transaction()) was still open at the end of the session, so the session was rolled back. ' +
        'Await it, or end it by its commit() or rollback().',
      abortedBy,
    );
  }
}

export function savepointOver(): SessionClosedError {
  return new SessionClosedError('this savepoint has ended. Await what runs in session.transaction() before it returns.');
}

export function isWithin(level: Level, savepoint: Level): boolean {
  for (let at: Level | undefined = level; at; at = at.parent) if (at === savepoint) return true;
  return false;
}
