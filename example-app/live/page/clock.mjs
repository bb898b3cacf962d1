// @ts-nocheck: it runs in the browser, of which the app has no types.

/** The time of the time line, in ms: the server's, without the stretches in which nothing was under way. */
export class Clock {
  #offset = 0;
  #skipped = 0;
  #stoppedAt = performance.now();

  /** @param at what the server's clock says now */
  set(at) {
    this.#offset = at - performance.now();
    this.#skipped = 0;
    this.#stoppedAt = at;
  }

  get isRunning() {
    return this.#stoppedAt === undefined;
  }

  get now() {
    return this.of(this.#stoppedAt ?? performance.now() + this.#offset);
  }

  /** @param at a time of the server */
  of(at) {
    return at - this.#skipped;
  }

  /** @param at when something has begun, by the server's clock */
  start(at) {
    if (this.isRunning) return;
    this.#skipped += Math.max(0, at - this.#stoppedAt);
    this.#stoppedAt = undefined;
  }

  stop() {
    if (this.isRunning) this.#stoppedAt = performance.now() + this.#offset;
  }
}
