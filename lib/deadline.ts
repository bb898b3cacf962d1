import * as timers from 'node:timers';

// As they are now: tests of applications fake them.
const { clearTimeout, setImmediate, setTimeout } = timers;

/** What a session waits for now has an end: one timer at a time. */
export class Deadline {
  private timer: NodeJS.Timeout | undefined;

  /** Replaces what was set before. @param ms 0 is no limit */
  set(ms: number, onPassed: () => void): void {
    this.clear();
    if (ms > 0) this.timer = setTimeout(onPassed, ms);
  }

  clear(): void {
    clearTimeout(this.timer);
    this.timer = undefined;
  }
}

/** Resolves in the next turn of the event loop. (That of `node:timers/promises` costs 1 us more.) */
export function nextTurn(): Promise<void> {
  return new Promise((resolve) => {
    setImmediate(resolve);
  });
}

/** Waits for a promise that does not reject, but no longer than this. */
export function settledWithin(ms: number, promise: Promise<unknown>): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    void promise.then(() => {
      clearTimeout(timer);
      resolve();
    });
  });
}
