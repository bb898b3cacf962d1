import type { Connection } from './connection';

/** Where a statement belongs: the session itself, or a savepoint in it. */
export interface Level {
  readonly txid: string;
  readonly parent: Level | undefined;
  /** Set on a savepoint while which statements of another level have run. */
  holdsOthers?: boolean;
}

export function isWithin(level: Level, savepoint: Level): boolean {
  for (let at: Level | undefined = level; at; at = at.parent) if (at === savepoint) return true;
  return false;
}

/** The right to run statements, taken for each run of a Knex builder; what Knex believes to be the connection. */
export class Lease {
  isReturned = false;
  /** Knex leaves its mark here when a statement's `.timeout()` has passed: the connection is still busy with it. */
  __knex__disposed: unknown;

  constructor(
    readonly connection: Connection,
    readonly level: Level,
  ) {}

  get __knexTxId(): string {
    return this.level.txid;
  }

  get __knexUid(): string | undefined {
    return this.connection.knexUid;
  }
}

/** Counts the leases that are out. */
export class Leases {
  private count = 0;
  private onDrained: (() => void) | undefined;

  taken(): void {
    this.count++;
  }

  returned(): void {
    this.count--;
    if (this.count === 0) this.onDrained?.();
  }

  drained(): Promise<void> {
    if (this.count === 0) return Promise.resolve();
    return new Promise((resolve) => {
      this.onDrained = resolve;
    });
  }
}

/** Runs statements one after the other: pg 9 will have no queue of its own. */
export class StatementQueue {
  private isBusy = false;
  private waiting: (() => void)[] | undefined;

  async run<T>(work: () => Promise<T>): Promise<T> {
    if (this.isBusy) {
      this.waiting ??= [];
      await new Promise<void>((resolve) => this.waiting?.push(resolve));
    }
    this.isBusy = true;
    try {
      return await work();
    } finally {
      // Handed over, not put down: a statement that comes in between must wait behind the one that is woken.
      const next = this.waiting?.shift();
      if (next) next();
      else this.isBusy = false;
    }
  }
}
