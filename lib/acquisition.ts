import type { Connection } from './connection';
import { Deadline } from './deadline';
import { SessionError, SessionUnavailableError } from './errors';

/** What a connection is asked for with. */
export interface Wish {
  /** Whether anybody still waits for it. */
  readonly isWanted: boolean;
  /** For how long, in ms. */
  readonly patience: number;
  /** Called when it is not wanted any more. */
  onUnwanted: (() => void) | undefined;
}

/** A session's wait for its connection: bounded, and given up when nobody wants it any more. */
export class Acquisition implements Wish {
  /** Rejects with a {@link SessionError}. */
  readonly connection: Promise<Connection>;
  private readonly deadline = new Deadline();
  private hasEnded = false;
  onUnwanted: (() => void) | undefined;
  private reject!: (error: unknown) => void;

  constructor(
    connect: (wish: Wish) => Promise<Connection>,
    readonly patience: number,
  ) {
    this.connection = new Promise((resolve, reject) => {
      this.reject = reject;
      this.deadline.set(patience, () => {
        this.giveUp(new SessionUnavailableError(new Error(`No connection was to be had within ${patience} ms (acquireTimeout).`)));
      });
      connect(this).then(
        (connection) => {
          // One that comes late is not needed any more.
          if (this.hasEnded) connection.release();
          else this.end(() => resolve(connection));
        },
        (error) => this.giveUp(error instanceof SessionError ? error : new SessionUnavailableError(error)),
      );
    });
  }

  get isWanted(): boolean {
    return !this.hasEnded;
  }

  giveUp(error: unknown): void {
    if (this.hasEnded) return;
    this.end(() => this.reject(error));
    this.onUnwanted?.();
  }

  private end(settle: () => void): void {
    this.hasEnded = true;
    this.deadline.clear();
    settle();
  }
}
