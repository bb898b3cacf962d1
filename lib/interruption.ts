import type { SessionError } from './errors';

/** Tells those who work for a session that it was given up from outside: the client has gone, it was open too long, the app shuts down. */
export class Interruption {
  /** Why; undefined as long as it was not. */
  reason: SessionError | undefined;
  /** Called once, when it is. */
  onInterrupt: (() => void) | undefined;
  // An AbortController costs more than a session: it is made for those who ask.
  private controller: AbortController | undefined;

  get signal(): AbortSignal {
    if (this.controller === undefined) {
      this.controller = new AbortController();
      if (this.reason) this.controller.abort(this.reason);
    }
    return this.controller.signal;
  }

  interrupt(reason: SessionError): void {
    this.reason ??= reason;
    this.controller?.abort(reason);
    this.onInterrupt?.();
  }
}
