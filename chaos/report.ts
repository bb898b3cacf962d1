import { queryOnce } from './faults';
import { kinds, type RequestRecord, stormSettings } from './kinds';
import { tornTransfers, wrongMoney } from './schema';
import type { Aftermath } from './storm';

export interface Figure {
  name: string;
  value: number;
  /** What it must not exceed. Without: for information. */
  limit?: number;
  /** Some examples, for people. */
  details?: string[];
}

export interface Report {
  seed: number;
  seconds: number;
  figures: Figure[];
}

export async function reportOf(aftermath: Aftermath): Promise<Report> {
  const { options, faults, records, calm } = aftermath;
  const all = [...records, ...calm];
  const figures = [
    ...Object.entries(faults).map(([name, value]) => ({ name: `fault: ${name}`, value })),
    ...answers(all),
    ...(await truth(all, aftermath.databaseUrl)),
    ...leaks(aftermath),
    ...peace(aftermath),
    ...statistics(all, aftermath),
  ];
  return { seed: options.seed, seconds: options.seconds, figures };
}

export function failuresOf({ figures }: Report): Figure[] {
  return figures.filter(isWrong);
}

/** What the clients got. */
function answers(all: RequestRecord[]): Figure[] {
  const ended = (end: RequestRecord['end']): RequestRecord[] => all.filter((record) => record.end === end);
  const unannounced = ended('cut').filter(({ kind }) => !('streams' in kinds[kind]));
  return [
    figure('requests', all.length),
    ...countsOf(ended('answered'), ({ status, code = '' }) => `answered ${status} ${code}`.trimEnd()),
    ...countsOf(ended('cut'), ({ kind }) => `cut by the server, ${kind}`),
    figure('behind an answer with which the connection ended', ended('unserved').length),
    figure('clients that left before their answer', ended('left').length),
    none('requests never answered', ended('never').map(describe)),
    none('connections cut where nothing had been sent', unannounced.map(describe)),
    none('answers that were not whole, or of another request', all.filter(({ isWrong }) => isWrong).map(describe)),
  ];
}

/** What the clients were told, against what is in the database. */
async function truth(all: RequestRecord[], databaseUrl: string): Promise<Figure[]> {
  const stored = new Set((await queryOnce<{ id: string }>(databaseUrl, 'SELECT id FROM transfers')).map(({ id }) => id));
  const torn = await queryOnce<{ id: string }>(databaseUrl, tornTransfers);
  const [money] = await queryOnce<{ amount: number }>(databaseUrl, wrongMoney);

  const isStored = ({ id }: RequestRecord): boolean => stored.has(id);
  const isNotStored = (record: RequestRecord): boolean => !isStored(record);
  const transfers = groupBy(
    all.filter(({ kind }) => kinds[kind].method === 'POST'),
    verdictOf,
  );
  const {
    acknowledged = [],
    refused = [],
    unknown = [],
    unanswered = [],
  }: Partial<Record<Verdict, RequestRecord[]>> = Object.fromEntries(transfers);
  return [
    figure('transfers acknowledged', acknowledged.length),
    none('acknowledged transfers that are missing', acknowledged.filter(isNotStored).map(describe)),
    figure('transfers refused', refused.length),
    none('refused transfers that are stored', refused.filter(isStored).map(describe)),
    figure('answered ERR_COMMIT_UNKNOWN, found stored', unknown.filter(isStored).length),
    figure('answered ERR_COMMIT_UNKNOWN, found not stored', unknown.filter(isNotStored).length),
    figure('transfers without an answer, found stored', unanswered.filter(isStored).length),
    figure('transfers without an answer, found not stored', unanswered.filter(isNotStored).length),
    none('torn transfers', torn.map(idOf)),
    figure('money created or lost', money?.amount ?? Number.NaN, 0),
  ];
}

/** What is left when all is quiet, and what happened to connections. */
function leaks({ quiet, last }: Aftermath): Figure[] {
  const { transactionTimeout, settleTimeout } = stormSettings.deadlines;
  const bound = transactionTimeout + settleTimeout + stormSettings.slackMs;
  const backends = quiet.backends.map(({ state, query }) => `${state}: ${query}`);
  return [
    figure('connections in use after the storm', quiet.used, 0),
    figure('requests waiting for a connection after the storm', quiet.waiting, 0),
    figure('sessions open after the storm (stats)', quiet.stats.open + quiet.stats.waiting, 0),
    none('backends left in a transaction or a query', backends),
    figure('connections given back twice', last.returnedTwice, 0),
    figure('longest time that a connection was held, ms', last.longestMs, bound),
    figure('the same with a row stream, which has no bound, ms', last.longestWithStreamMs),
    { ...figure('unhandled rejections', last.unhandledRejections, 0), details: last.details },
    { ...figure('uncaught exceptions', last.uncaughtExceptions, 0), details: last.details },
    { ...figure('warnings', last.warnings, 0), details: last.details },
  ];
}

/** How the app is afterwards, up to its end. */
function peace({ calm, drain }: Aftermath): Figure[] {
  const unexpected = calm.filter((record) => !isExpected(record));
  const bound = drain.patienceMs + stormSettings.deadlines.settleTimeout + stormSettings.slackMs;
  return [
    none('wrong answers after the storm', unexpected.map(describe)),
    figure('drain under load, ms', drain.ms, bound),
    figure('sessions open after drain', drain.open, 0),
  ];
}

/** What the package says of itself: it must know of all that the clients know of. */
function statistics(all: RequestRecord[], { last: { stats, reported } }: Aftermath): Figure[] {
  const successes = all.filter(({ status, kind }) => status > 0 && status < 400 && kinds[kind].stores).length;
  const unknown = all.filter(({ code }) => code === 'ERR_COMMIT_UNKNOWN').length;
  return [
    figure('sessions committed (stats)', stats.committed),
    figure('sessions rolled back (stats)', stats.rolledBack),
    figure('sessions with an unknown outcome (stats)', stats.unknown),
    figure('successes beyond those that stats knows of', Math.max(0, successes - stats.committed), 0),
    figure('unknown outcomes beyond those that stats knows of', Math.max(0, unknown - stats.unknown), 0),
    ...Object.entries(reported).map(([code, value]) => figure(`onError: ${code}`, value)),
  ];
}

type Verdict = 'acknowledged' | 'refused' | 'unknown' | 'unanswered';

/** What a client may conclude from what it got. */
function verdictOf({ kind, end, status, code }: RequestRecord): Verdict {
  if (end !== 'answered') return 'unanswered';
  if (code === 'ERR_COMMIT_UNKNOWN') return 'unknown';
  return status < 400 && kinds[kind].stores ? 'acknowledged' : 'refused';
}

function isExpected({ kind, end, status, code, isWrong }: RequestRecord): boolean {
  const expected: { status: number; code?: string } = kinds[kind].expected;
  if (expected.status === 0) return end === 'cut';
  return end === 'answered' && !isWrong && status === expected.status && code === expected.code;
}

function describe({ id, kind, end, status, code = '', how }: RequestRecord): string {
  return `${kind} ${id}: ${end} ${status} ${code} (${how})`;
}

function idOf({ id }: { id: string }): string {
  return id;
}

function figure(name: string, value: number, limit?: number): Figure {
  return { name, value: Math.round(value), ...(limit !== undefined && { limit }) };
}

function none(name: string, culprits: string[]): Figure {
  return { ...figure(name, culprits.length, 0), details: culprits.slice(0, 5) };
}

function isWrong({ value, limit }: Figure): boolean {
  // Also if there is no value.
  return limit !== undefined && !(value <= limit);
}

function countsOf(records: RequestRecord[], nameOf: (record: RequestRecord) => string): Figure[] {
  const counts = [...groupBy(records, nameOf)].map(([name, { length }]) => figure(name, length));
  return counts.sort((one, other) => other.value - one.value);
}

function groupBy<T, Key>(values: T[], keyOf: (value: T) => Key): Map<Key, T[]> {
  const groups = new Map<Key, T[]>();
  for (const value of values) {
    const key = keyOf(value);
    const group = groups.get(key);
    if (group) group.push(value);
    else groups.set(key, [value]);
  }
  return groups;
}

/** For people. */
export function tableOf(report: Report): string {
  return report.figures
    .map((shown) => {
      const { name, value, limit, details = [] } = shown;
      const judged = limit === undefined ? '' : limit === 0 ? 'ok' : `ok: at most ${limit}`;
      const verdict = isWrong(shown) ? `WRONG: at most ${limit}` : judged;
      const examples = isWrong(shown) ? details.map((detail) => `\n    ${detail.replaceAll('\n', '\n    ')}`) : [];
      return `${name.padEnd(60)} ${String(value).padStart(8)}  ${verdict}`.trimEnd() + examples.join('');
    })
    .join('\n');
}
