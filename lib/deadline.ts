import { AsyncResource } from 'node:async_hooks';
import { performance } from 'node:perf_hooks';
import * as timers from 'node:timers';

// As they are now: tests of applications fake them.
const { clearTimeout, setImmediate, setTimeout } = timers;
/** The time in ms. */
export const now: () => number = performance.now.bind(performance);

/**
 * How often those far away are looked at. Nearly all are called off before they pass, and need no timer of their own: those of a session
 * took 4 % of what a small request costs.
 */
const TICK_MS = 50;
const farAway = new Set<Deadline>();
/** It looks for all of them, and keeps the context of none. */
const watch = new AsyncResource('express-knex-session.deadlines');
let isTicking = false;

function look(): void {
  isTicking = false;
  const horizon = now() + 2 * TICK_MS;
  for (const deadline of farAway) {
    if (deadline.passesAt > horizon) continue;
    farAway.delete(deadline);
    deadline.startTimer();
  }
  lookLater();
}

function lookLater(): void {
  if (isTicking || farAway.size === 0) return;
  isTicking = true;
  watch.runInAsyncScope(setTimeout, undefined, look, TICK_MS);
}

/** What a session waits for now has an end: one at a time. It passes in the context that it was made in. */
export class Deadline extends AsyncResource {
  private timer: NodeJS.Timeout | undefined;
  /** As {@link now} tells the time. */
  passesAt = 0;
  private onPassed: (() => void) | undefined;

  constructor() {
    super('express-knex-session.deadline');
  }

  /** Replaces what was set before. @param ms 0 is no limit */
  set(ms: number, onPassed: () => void): void {
    this.clear();
    if (ms <= 0) return;
    this.onPassed = onPassed;
    this.passesAt = now() + ms;
    if (ms < TICK_MS) this.startTimer();
    else {
      farAway.add(this);
      lookLater();
    }
  }

  startTimer(): void {
    const { onPassed, passesAt } = this;
    // Where the event loop was busy for longer than that, it has passed by now: Node 21 and later warn of a negative delay.
    const ms = Math.max(1, Math.ceil(passesAt - now()));
    this.timer = this.runInAsyncScope(() => setTimeout(onPassed as () => void, ms));
  }

  clear(): void {
    if (this.timer === undefined) farAway.delete(this);
    else clearTimeout(this.timer);
    this.timer = this.onPassed = undefined;
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
