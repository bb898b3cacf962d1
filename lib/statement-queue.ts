import type { Connection } from './connection';
import type { Level } from './open-savepoints';
import type { StatementRunner } from './statement-runner';

/** Known to all copies of this package. */
const LEASE = Symbol.for('express-knex-session.lease');

export function isLease(value: unknown): value is Lease {
  return typeof value === 'object' && value !== null && LEASE in value;
}

/** The right to run statements, taken for each run of a Knex builder; what Knex believes to be the connection. */
export class Lease {
  isReturned = false;
  /** Whether the turn has gone on to the next. */
  hasPassed = false;
  /** Whether the next has had its turn before the answer to this one's statement. */
  isShared = false;
  /** Whether the server may still be busy with its statement. */
  isRunning = false;
  /** Knex leaves its mark here when a statement's `.timeout()` has passed: the connection is still busy with it. */
  __knex__disposed: unknown;

  constructor(
    readonly connection: Connection,
    readonly level: Level,
    /** Whether it is for SAVEPOINT, RELEASE or ROLLBACK TO: those of a level that has just ended still run. */
    private readonly isControl: boolean,
    /** Not the level's own: a checkpoint may have put another one in its place. */
    readonly transaction: StatementRunner,
  ) {}

  get [LEASE](): true {
    return true;
  }

  get isOver(): boolean {
    return (this.isControl ? this.level.parent : this.level)?.isOver ?? false;
  }

  get __knexTxId(): string {
    return this.level.txid;
  }

  get __knexUid(): string | undefined {
    return this.connection.knexUid;
  }
}

/**
 * Whose turn it is. A turn is asked for when Knex asks for a connection, which is the order in which statements were issued, and lasts
 * until Knex gives it back: pg 9 will have no queue of its own. In pg's pipeline mode it is shared as soon as the statement is sent.
 */
export class StatementQueue {
  private isTaken = false;
  private isAbandoned = false;
  /** Statements that are under way, and have let others go. */
  private sharing = 0;
  private waiting: (() => void)[] | undefined;
  private whenDrained: Promise<void> | undefined;
  private onDrained: (() => void) | undefined;

  get isBusy(): boolean {
    return this.isTaken || this.sharing > 0;
  }

  get isShared(): boolean {
    return this.sharing > 0;
  }

  /** Whether others than this one are under way that share their turn. */
  isSharedWithOthersThan({ isShared }: Lease): boolean {
    return this.sharing > (isShared ? 1 : 0);
  }

  /** Nothing to wait for if nobody is in front. */
  turn(): Promise<void> | undefined {
    if (this.isTaken && !this.isAbandoned) {
      return new Promise((resolve) => {
        this.waiting ??= [];
        this.waiting.push(resolve);
      });
    }
    this.isTaken = true;
    return undefined;
  }

  /** The statement is sent, and the next one may follow. */
  share(): void {
    this.sharing++;
    this.pass();
  }

  /** A statement that has shared its turn has ended. */
  leave(): void {
    this.sharing--;
    this.noteIdle();
  }

  pass(): void {
    // Handed over, not put down: a statement that comes in between must wait behind the one that is woken.
    const next = this.waiting?.shift();
    if (next) next();
    else {
      this.isTaken = false;
      this.noteIdle();
    }
  }

  private noteIdle(): void {
    if (this.isBusy) return;
    this.onDrained?.();
    this.whenDrained = this.onDrained = undefined;
  }

  /** Lets everybody go: the statement in front does not end. */
  abandon(): void {
    this.isAbandoned = true;
    for (const next of this.waiting?.splice(0) ?? []) next();
    this.onDrained?.();
  }

  /** Resolves when everybody has had his turn; nothing to wait for if nobody has one. */
  drained(): Promise<void> | undefined {
    if (!this.isBusy || this.isAbandoned) return undefined;
    this.whenDrained ??= new Promise((resolve) => {
      this.onDrained = resolve;
    });
    return this.whenDrained;
  }
}
