// @ts-nocheck: it runs in the browser, of which the app has no types.
import { Clock } from './clock.mjs';

const WINDOW_MS = 5_000;
const MAX_ROWS = 23;
/** How long the axis goes on when nothing is under way any more. */
const LINGER_MS = 600;
/** In pixels: what is shorter could not be seen. */
const MIN_WIDTHS = { running: 2, waiting: 4, holding: 6, settling: 6, responding: 4 };
const GAP = 8;

const SIGNS = {
  committed: '✓ committed',
  'rolled back': '✗ rolled back',
  unknown: '? outcome unknown',
  unused: '– no connection',
  none: '',
};
const DOING = {
  running: 'handler runs',
  waiting: 'waits for a connection',
  holding: 'holds a connection',
  responding: 'response on its way',
};

/** Requests as bars: a row for each, the newest at the bottom. */
export class Timeline {
  #rows = new Map();
  #clock = new Clock();
  #count = 0;
  #rest;
  #margin;
  #isMoving = !matchMedia('(prefers-reduced-motion: reduce)').matches;

  constructor(list) {
    this.list = list;
    this.#margin = 2 * Number.parseFloat(getComputedStyle(document.documentElement).fontSize); // See `--margin` in timeline.css.
    addEventListener('resize', () => this.#draw());
  }

  /** @param at what the server's clock says now */
  reset(at) {
    this.#clock.set(at);
    this.#rows.clear();
    this.list.replaceChildren();
  }

  /** The latest request of which this is true. */
  find(isWanted) {
    return [...this.#rows.values()].map(({ request }) => request).findLast(isWanted);
  }

  /** @param request what the server says of it now
   * @returns its number */
  show(request) {
    const isNew = !this.#rows.has(request.id);
    if (isNew && request.phase === 'done') return undefined; // It had begun before the page was opened.
    if (isNew) this.#begin(request);
    const row = this.#rows.get(request.id);
    if (isNew || row.request.phase !== request.phase) this.#enter(row, request);
    row.request = request;
    row.element.dataset.phase = request.phase;
    row.element.dataset.outcome = request.outcome;
    tellFacts(row, request);
    if (isNew && this.#clock.isRunning) this.#tick();
    if (request.phase === 'done') this.#restSoon();
    if (!this.#isMoving) this.#draw();
    return row.number;
  }

  #begin(request) {
    clearTimeout(this.#rest);
    this.#clock.start(request.at);
    const number = ++this.#count;
    const element = document.createElement('li');
    element.dataset.request = request.id;
    const [name, track, bar, facts] = ['name', 'track', 'bar', 'facts'].map((className) => {
      const part = document.createElement('span');
      part.className = className;
      return part;
    });
    name.textContent = `#${number} ${request.method} ${request.route}`;
    name.title = request.route;
    track.ariaHidden = 'true';
    track.append(bar);
    element.append(name, ' ', track, ' ', facts);
    const isAtEnd = this.list.scrollHeight - this.list.scrollTop - this.list.clientHeight < 40;
    this.list.append(element);
    if (isAtEnd) this.list.scrollTop = this.list.scrollHeight;
    this.#rows.set(request.id, { number, element, track, bar, facts, segments: [], request });
    for (const [id, row] of this.#rows) if (this.#rows.size > MAX_ROWS && row.request.phase === 'done') this.#remove(id);
  }

  #enter(row, { phase, at }) {
    const from = this.#clock.of(at);
    if (phase === 'done') {
      row.end = from;
      return;
    }
    const element = document.createElement('i');
    element.dataset.segment = phase;
    row.bar.append(element);
    row.segments.push({ element, from });
  }

  #restSoon() {
    if ([...this.#rows.values()].some(({ end }) => end === undefined)) return;
    clearTimeout(this.#rest);
    this.#rest = setTimeout(() => this.#clock.stop(), LINGER_MS);
  }

  #isTicking = false;

  #tick() {
    if (this.#isTicking || !this.#isMoving) return;
    this.#isTicking = true;
    requestAnimationFrame(() => {
      this.#isTicking = false;
      this.#draw();
      if (this.#clock.isRunning) this.#tick();
    });
  }

  #draw() {
    const { now } = this.#clock;
    for (const [id, row] of this.#rows) {
      if (row.end < now - WINDOW_MS) this.#remove(id);
    }
    const [first] = this.#rows.values();
    if (!first) return;
    const width = first.track.clientWidth;
    const scale = (width - this.#margin) / WINDOW_MS;
    // All reading of sizes before all writing, or the browser lays the page out once for each row.
    for (const row of this.#rows.values()) row.factsWidth ??= row.facts.scrollWidth + 4;
    for (const row of this.#rows.values()) this.#place(row, now, width, scale);
  }

  #place({ segments, end, bar, facts, factsWidth }, now, width, scale) {
    const left = (WINDOW_MS - now + segments[0].from) * scale;
    let right = left;
    segments.forEach(({ element, from }, i) => {
      const until = segments[i + 1]?.from ?? end ?? now;
      const size = Math.max(MIN_WIDTHS[element.dataset.segment], (until - from) * scale);
      element.style.width = `${size}px`;
      right += size;
    });
    bar.style.transform = `translateX(${left}px)`;
    const after = width - right - GAP;
    const before = left - GAP;
    const isAfter = factsWidth <= after || before < after;
    facts.style.setProperty('--room', `${isAfter ? after : before}px`);
    facts.style.setProperty('--x', `${isAfter ? right + GAP : Math.max(0, before - factsWidth)}px`);
  }

  #remove(id) {
    this.#rows.get(id).element.remove();
    this.#rows.delete(id);
  }
}

function tellFacts(row, request) {
  const [fact, ...details] = factsOf(request);
  const text = [fact, ...details].join(', ');
  if (row.text === text) return;
  const detail = document.createElement('span');
  detail.className = 'detail';
  detail.textContent = text.slice(fact.length);
  row.facts.replaceChildren(fact, detail);
  row.text = text;
  row.factsWidth = undefined;
}

function factsOf({ phase, decision, status, outcome, reason, error, waitedMs, heldMs, isLate, isConnectionDestroyed }) {
  if (phase === 'settling') return [decision === 'rollback' ? 'ROLLBACK' : 'COMMIT'];
  if (phase !== 'done') return [DOING[phase]];
  const facts = [[status ?? 'client gone', SIGNS[outcome]].filter(Boolean).join(' ')];
  if (reason === 'error') facts.push(error);
  if (waitedMs >= 20) facts.push(`waited ${Math.round(waitedMs)} ms`);
  if (heldMs !== undefined) facts.push(`held ${Math.round(heldMs)} ms`);
  if (isLate) facts.push('used after its end');
  if (isConnectionDestroyed) facts.push('connection destroyed');
  return facts;
}
