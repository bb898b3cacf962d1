/**
 * The fault matrix: what happens when a fault comes at a moment of a request. RB: rolled back; D: the connection is destroyed.
 * Everywhere: released exactly once, no unhandled rejection, no warning, the first error is kept, and the next request is served.
 * Each cell but '-' is a test of this name, in the file of its row.
 */
export const matrix = {
  'backend killed, connection reset': {
    'before BEGIN': '503, D',
    'during a statement': '500, D, no rows',
    'between statements': 'next statement or COMMIT fails, 500, D',
    'during COMMIT': 'unknown, 500, D',
    'after COMMIT, before the response': '200, D',
    'during the response': 'unaffected',
  },
  'black-holed network': {
    'before BEGIN': '503 by deadline',
    'during a statement': 'deadline, RB, D',
    'between statements': 'deadline, RB, D',
    'during COMMIT': 'unknown by deadline, D',
    'after COMMIT, before the response': '200',
    'during the response': 'unaffected',
  },
  'server restart': {
    'before BEGIN': '503',
    'during a statement': '500, D',
    'between statements': '500, D',
    'during COMMIT': 'unknown',
    'after COMMIT, before the response': '200',
    'during the response': 'unaffected',
  },
  'SQL error thrown': {
    'before BEGIN': '-',
    'during a statement': 'RB, 500',
    'between statements': '-',
    'during COMMIT': 'RB, 500',
    'after COMMIT, before the response': '-',
    'during the response': '-',
  },
  'SQL error swallowed': {
    'before BEGIN': '-',
    'during a statement': 'RB, 500',
    'between statements': 'RB, 500',
    'during COMMIT': 'tag ROLLBACK, 500',
    'after COMMIT, before the response': '-',
    'during the response': '-',
  },
  '40001, 40P01': {
    'before BEGIN': '-',
    'during a statement': 'RB, retryable',
    'between statements': '-',
    'during COMMIT': 'RB, retryable',
    'after COMMIT, before the response': '-',
    'during the response': '-',
  },
  'client aborts': {
    'before BEGIN': 'waiter gives up, nothing leaks',
    'during a statement': 'cancel, drain, RB',
    'between statements': 'RB',
    'during COMMIT': 'left to finish',
    'after COMMIT, before the response': 'committed',
    'during the response': 'committed',
  },
  'handler throws': {
    'before BEGIN': 'next(err)',
    'during a statement': 'drain, RB',
    'between statements': 'RB',
    'during COMMIT': 'outcome stands',
    'after COMMIT, before the response': 'outcome stands',
    'during the response': 'connection cut',
  },
  'handler hangs': {
    'before BEGIN': 'holds nothing',
    'during a statement': 'deadline: cancel, RB',
    'between statements': 'deadline: RB, 503',
    'during COMMIT': 'deadline: unknown',
    'after COMMIT, before the response': '-',
    'during the response': '-',
  },
  statement_timeout: {
    'before BEGIN': '-',
    'during a statement': 'RB, 500',
    'between statements': '-',
    'during COMMIT': 'RB, 500',
    'after COMMIT, before the response': '-',
    'during the response': '-',
  },
  'idle_in_transaction timeout': {
    'before BEGIN': '-',
    'during a statement': '-',
    'between statements': 'D, 500',
    'during COMMIT': '-',
    'after COMMIT, before the response': '-',
    'during the response': '-',
  },
  'pool exhausted': {
    'before BEGIN': '503 by deadline',
    'during a statement': '-',
    'between statements': '-',
    'during COMMIT': '-',
    'after COMMIT, before the response': '-',
    'during the response': '-',
  },
  'ROLLBACK fails': {
    'before BEGIN': '-',
    'during a statement': "D, the app's error kept",
    'between statements': "D, the app's error kept",
    'during COMMIT': '-',
    'after COMMIT, before the response': '-',
    'during the response': '-',
  },
  'drain / shutdown': {
    'before BEGIN': '503',
    'during a statement': 'deadline, cancel, D',
    'between statements': 'deadline, cancel, D',
    'during COMMIT': 'left to finish',
    'after COMMIT, before the response': '200',
    'during the response': 'unaffected',
  },
  'statement not awaited': {
    'before BEGIN': 'begins, drained',
    'during a statement': 'drained, then COMMIT',
    'between statements': 'drained, then COMMIT',
    'during COMMIT': 'refused, named',
    'after COMMIT, before the response': 'refused',
    'during the response': 'refused',
  },
} as const satisfies Record<string, Record<Moment, string>>;

export const moments = [
  'before BEGIN',
  'during a statement',
  'between statements',
  'during COMMIT',
  'after COMMIT, before the response',
  'during the response',
] as const;

export type Moment = (typeof moments)[number];
export type Fault = keyof typeof matrix;

/** The moments at which a fault has an outcome. */
type MomentOf<F extends Fault> = { [M in Moment]: (typeof matrix)[F][M] extends '-' ? never : M }[Moment];

/** A test, or several that differ in the fault's kind or in what the handler does. */
type Cell = (() => Promise<void>) | { readonly [variant: string]: () => Promise<void> };

export function momentsOf(fault: Fault): Moment[] {
  return moments.filter((moment) => matrix[fault][moment] !== '-');
}

/** The row of a fault: one test for each of its cells, or the compiler and the run complain. */
export function describeFault<F extends Fault>(fault: F, cells: { readonly [M in MomentOf<F>]: Cell }): void {
  const given = cells as { readonly [moment: string]: Cell };
  const due = momentsOf(fault);
  const tests = due.map((moment) => [moment, variantsOf(given[moment])] as const);
  const missing = tests.filter(([, variants]) => variants.length === 0).map(([moment]) => moment);
  const odd = Object.keys(given).filter((moment) => !due.includes(moment as Moment));
  if (missing.length + odd.length > 0)
    throw new Error(`Without a test, or not in the matrix: ${fault}, ${[...missing, ...odd].join('; ')}`);

  describe(`fault: ${fault}`, () => {
    for (const [moment, variants] of tests) {
      for (const [variant, test] of variants) it(`${moment}: ${matrix[fault][moment]}${variant && ` (${variant})`}`, test);
    }
  });
}

function variantsOf(cell: Cell | undefined): [string, () => Promise<void>][] {
  return typeof cell === 'function' ? [['', cell]] : Object.entries(cell ?? {});
}
