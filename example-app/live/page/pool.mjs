// @ts-nocheck: it runs in the browser, of which the app has no types.

/** The pool as slots, and how many requests wait for one. */
export class Pool {
  #slots = [];
  #waiting = new Set();
  #isMoving = !matchMedia('(prefers-reduced-motion: reduce)').matches;

  constructor(list, counter) {
    this.list = list;
    this.counter = counter;
  }

  reset(size) {
    this.#slots = Array.from({ length: size }, () => ({ element: document.createElement('li'), id: undefined }));
    this.list.replaceChildren(...this.#slots.map(({ element }) => element));
    for (const slot of this.#slots) this.#fill(slot);
    this.#waiting.clear();
    this.counter.textContent = '0';
  }

  /** @param number that of the request in the time line */
  show({ id, phase, outcome }, number) {
    if (phase === 'waiting') this.#waiting.add(id);
    else this.#waiting.delete(id);
    this.counter.textContent = String(this.#waiting.size);

    const isHolding = phase === 'holding' || phase === 'settling';
    const own = this.#slots.find((slot) => slot.id === id);
    if (isHolding && !own)
      this.#fill(
        this.#slots.find((slot) => slot.id === undefined),
        id,
        number,
      );
    if (!isHolding && own) this.#empty(own, outcome);
  }

  #fill(slot, id, number) {
    if (!slot) return;
    for (const glow of slot.element.getAnimations()) glow.cancel();
    slot.id = id;
    slot.element.dataset.slot = '';
    slot.element.dataset.taken = String(id !== undefined);
    const word = document.createElement('span');
    word.textContent = 'request ';
    slot.element.replaceChildren(...(id === undefined ? ['free'] : [word, `#${number}`]));
  }

  #empty(slot, outcome) {
    this.#fill(slot);
    // It glows for a moment: most requests give their connection back sooner than an eye sees that they had one.
    slot.element.dataset.last = outcome;
    if (this.#isMoving) slot.element.animate([{ backgroundColor: 'var(--glow)' }, {}], { duration: 900, easing: 'ease-out' });
  }
}
