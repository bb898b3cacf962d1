/** What a client gets when nothing is disturbed; status 0 is a connection that the server cuts. */
interface Expected {
  status: number;
  code?: string;
}

interface Kind {
  method: 'GET' | 'POST';
  /** How often, beside the others. */
  weight: number;
  expected: Expected;
  /** Whether a success that has come to its end says that the transfer is stored. */
  stores: boolean;
  /** Whether bytes leave before the session has settled: only then may the server answer by cutting the connection. */
  streams?: boolean;
}

const stored = { method: 'POST', stores: true } as const;
const read = { method: 'GET', stores: false, expected: { status: 200 } } as const;
const failed = (code: string, status = 500): Expected => ({ status, code });

/** Every kind of request in the storm; routes.ts has a handler for each. */
export const kinds = {
  transfer: { ...stored, weight: 30, expected: { status: 201 } },
  unawaited: { ...stored, weight: 6, expected: { status: 201 } },
  savepoint: { ...stored, weight: 4, expected: { status: 201 } },
  slow: { ...stored, weight: 4, expected: { status: 201 } },
  export: { ...stored, streams: true, weight: 5, expected: { status: 201 } },

  failing: { ...stored, weight: 5, expected: failed('APP') },
  swallowed: { ...stored, weight: 5, expected: failed('ERR_TRANSACTION_ABORTED') },
  deferred: { ...stored, weight: 5, expected: failed('23514') },
  exportDeferred: { ...stored, streams: true, weight: 3, expected: { status: 0 } },
  overtaken: { ...stored, weight: 2, expected: failed('APP') },
  givenUp: { ...stored, weight: 4, expected: failed('APP') },
  hung: { ...stored, weight: 0.5, expected: failed('ERR_SESSION_TIMEOUT', 503) },
  hungLate: { ...stored, weight: 0.5, expected: failed('ERR_SESSION_TIMEOUT', 503) },
  hungStatement: { ...stored, weight: 0.5, expected: failed('ERR_SESSION_TIMEOUT', 503) },
  dryRun: { method: 'POST', stores: false, weight: 3, expected: { status: 200 } },

  read: { ...read, weight: 20 },
  unused: { ...read, weight: 2 },
  rows: { ...read, streams: true, weight: 3 },
  manyRows: { ...read, streams: true, weight: 0.3 },
} as const satisfies Record<string, Kind>;

export type KindName = keyof typeof kinds;
export const kindNames = Object.keys(kinds) as KindName[];

export const rowCounts = { rows: 300, manyRows: 15_000 } as const;

/** The body of a POST. */
export interface Transfer {
  from: number;
  to: number;
  amount: number;
}

/** How a request ended for its client. */
export interface RequestRecord {
  id: string;
  kind: KindName;
  /**
   * - `answered`: a response that came to its end.
   * - `cut`: the server ended the connection before that, and the client was still there.
   * - `unserved`: the server closed the connection after its answer to an earlier request, as it had announced there.
   * - `left`: the client went first.
   * - `never`: nothing came, for much longer than all deadlines together.
   */
  end: 'answered' | 'cut' | 'unserved' | 'left' | 'never';
  status: number;
  code: string | undefined;
  /** Whether the answer was another request's, or lacked rows. */
  isWrong: boolean;
  /** For people: how the client behaved, and what came before on its connection. */
  how: string;
}

export const stormSettings = {
  clients: 64,
  poolSize: 5,
  accounts: 200,
  startBalance: 1_000,
  deadlines: { acquireTimeout: 1_500, transactionTimeout: 1_000, settleTimeout: 800 },
  /** For a busy machine: how much longer than its bound a connection may be held. */
  slackMs: 1_000,
  /** When a client that has stayed gives its answer up. */
  neverMs: 15_000,
};
export type Deadlines = typeof stormSettings.deadlines;
