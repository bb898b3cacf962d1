import type { Connection } from './connection';
import { Deadline } from './deadline';
import { SessionError, SessionUnavailableError } from './errors';

/** A session's wait for its connection: bounded, and given up when nobody wants it any more. */
export class Acquisition {
  /** Rejects with a {@link SessionError}. */
  readonly connection: Promise<Connection>;
  private readonly deadline = new Deadline();
  private hasEnded = false;
  private reject!: (error: unknown) => void;

  constructor(connect: (isWanted: () => boolean) => Promise<Connection>, acquireTimeout: number) {
    this.connection = new Promise((resolve, reject) => {
      this.reject = reject;
      this.deadline.set(acquireTimeout, () => {
        this.giveUp(new SessionUnavailableError(new Error(`No connection was to be had within ${acquireTimeout} ms (acquireTimeout).`)));
      });
      connect(() => !this.hasEnded).then(
        (connection) => {
          // One that comes late is not needed any more.
          if (this.hasEnded) connection.release();
          else this.end(() => resolve(connection));
        },
        (error) => this.giveUp(error instanceof SessionError ? error : new SessionUnavailableError(error)),
      );
    });
  }

  giveUp(error: unknown): void {
    if (!this.hasEnded) this.end(() => this.reject(error));
  }

  private end(settle: () => void): void {
    this.hasEnded = true;
    this.deadline.clear();
    settle();
  }
}
