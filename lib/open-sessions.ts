import { Deadline, nextTurn } from './deadline';
import { describe } from './describe';
import { SessionUnavailableError } from './errors';
import { aDurationFrom, isDuration } from './resolve-options';
import type { Transaction } from './transaction';

/** How the sessions of one middleware stand. */
export interface SessionStats {
  /** Sessions that hold a connection now. */
  readonly open: number;
  /** Sessions that wait for a connection now. */
  readonly waiting: number;
  /** Sessions committed since the middleware was made. */
  readonly committed: number;
  /** Sessions rolled back since then, wanted or not. */
  readonly rolledBack: number;
  /** Sessions since then of which nobody knows whether they were committed (`ERR_COMMIT_UNKNOWN`). */
  readonly unknown: number;
}

/** The sessions of one middleware that hold a connection or wait for one. */
export class OpenSessions {
  private readonly open = new Set<Transaction>();
  private readonly ended = { committed: 0, rolledBack: 0, unknown: 0 };
  private isDraining = false;
  private onEmpty: (() => void)[] = [];

  /** @throws SessionUnavailableError while the application shuts down */
  join(transaction: Transaction, { evenIfDraining = false } = {}): void {
    if (this.isDraining && !evenIfDraining) throw shuttingDown('No session is opened any more.');
    this.open.add(transaction);
  }

  leave(transaction: Transaction): void {
    if (!this.open.delete(transaction)) return;
    const { outcome } = transaction;
    if (outcome === 'committed' || outcome === 'unknown') this.ended[outcome]++;
    else if (outcome === 'rolled back') this.ended.rolledBack++;
    if (this.open.size === 0) for (const resolve of this.onEmpty.splice(0)) resolve();
  }

  stats(): SessionStats {
    let waiting = 0;
    for (const transaction of this.open) if (!transaction.isConnected) waiting++;
    return { open: this.open.size - waiting, waiting, ...this.ended };
  }

  async drain(ms: number): Promise<void> {
    if (!isDuration(ms, 0)) throw new TypeError(`Expected \`ms\` to be ${aDurationFrom(0)}, got ${describe(ms)}.`);
    this.isDraining = true;
    if (this.open.size === 0) return;
    const patience = new Deadline();
    const interruptAll = (): void => {
      for (const transaction of this.open) {
        transaction.interrupt(shuttingDown('The session was rolled back before its request had ended.'), { mustDestroy: true });
      }
    };
    if (ms > 0) patience.set(ms, interruptAll);
    else interruptAll();
    await new Promise<void>((resolve) => this.onEmpty.push(resolve));
    patience.clear();
    // The last response has been let go by then.
    await nextTurn();
  }
}

function shuttingDown(consequence: string): SessionUnavailableError {
  return new SessionUnavailableError(undefined, `The application is shutting down (drain). ${consequence}`);
}
