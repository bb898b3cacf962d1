import { setTimeout as sleep } from 'node:timers/promises';
import type { Knex } from 'knex';
import { PoolApp } from './pool-economy-app';
import { format, median } from './statistics';
import { percentile, SteadyLoad } from './steady-load';

const POOL_SIZE = 5;
const CLIENTS = 50;
const ROUNDS = 3;
const ROUND_MS = 2_000;

const ways = {
  'each statement on the pool': 'per operation: each statement on `knex`',
  'each statement withSession': 'per operation: `withSession` for each statement',
  'one transaction for all': 'per process: one transaction for all',
  session: 'per request: this package',
} as const;
type Name = keyof typeof ways;

export interface WayFigures {
  way: string;
  perSecond: number;
  p99: number;
  /** Of the requests that were answered. */
  connectionsPerRequest: number;
  waitPerRequestMs: number;
  waitP99Ms: number;
  transfers: number;
  /** In percent of the transfers. */
  failed: number;
  lost: number;
  half: number;
  storedAlthoughRefused: number;
  errors: Record<string, number>;
}

/** SQLAlchemy's three ways to live with a session, side by side: four statements a request, two of which belong together; one request in 20 fails between these two. */
export async function measureThreeWays(knex: Knex): Promise<{ report: string; figures: WayFigures[] }> {
  const names = Object.keys(ways) as Name[];
  const rounds = new Map(names.map((name) => [name, [] as Round[]]));
  for (let round = 0; round < ROUNDS; round++) {
    for (const name of names) rounds.get(name)?.push(await run(name, knex));
  }
  const figures = names.map((name) => figuresOf(name, rounds.get(name) as Round[]));
  const share = (count: number, of: number) => (count === 0 ? '0' : `${format(count)} (${format((100 * count) / of, 1)} %)`);
  const lines = figures.map(
    (one) =>
      `| ${one.way} | ${format(one.perSecond)} | ${format(one.connectionsPerRequest, 2)} | ${format(one.waitPerRequestMs, 1)} ms | ${format(one.waitP99Ms)} ms | ${format(one.p99)} ms | ` +
      `${share(one.failed, one.transfers)} | ${share(one.lost, one.transfers)} | ${share(one.half, one.transfers)} |`,
  );
  const report = [
    `The three ways: 4 statements a request, pool of ${POOL_SIZE}, ${CLIENTS} clients, ${ROUNDS} rounds of ${ROUND_MS / 1_000} s, interleaved; one request in 20 fails between two inserts that belong together`,
    '| | requests per second | connections taken per request | wait for them, per request | p99 of one wait | p99 of a request | failed for no reason | answered 200, not stored | half stored |',
    '| --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ...lines,
    ...figures.flatMap(({ way, errors }) => Object.entries(errors).map(([message, count]) => `  ${way}: ${count} x ${message}`)),
  ].join('\n');
  return { report, figures };
}

type Round = Awaited<ReturnType<typeof run>>;

/** A process of its own for each round. */
async function run(name: Name, knex: Knex) {
  await knex('entries').truncate();
  const app = await PoolApp.start(name, { poolSize: POOL_SIZE });
  const answers = new Map<number, number>();
  const load = await SteadyLoad.start({
    port: app.port,
    connections: CLIENTS,
    requestOf: (n) => `POST /transfer/${n}`,
    onAnswer: (n, status) => answers.set(n, status),
  });
  try {
    await sleep(1_000);
    load.take();
    const { errors: early } = await app.figures();
    await sleep(ROUND_MS);
    const measured = load.take();
    const { waits, errors: late } = await app.figures();
    await load.stop();
    // Until then a COMMIT may be on its way that nobody waits for.
    await sleep(300);
    return { ...measured, waits, errors: [early, late], ...(await compare(answers, knex)) };
  } finally {
    await load.stop(0);
    await app.stop();
  }
}

function figuresOf(name: Name, rounds: Round[]): WayFigures {
  const sum = (value: (round: Round) => number) => rounds.reduce((total, round) => total + value(round), 0);
  const answered = sum((round) => round.answered);
  const waits = rounds.flatMap((round) => round.waits);
  const latencies = rounds.flatMap((round) => round.latencies);
  const errors: Record<string, number> = {};
  for (const [message, count] of rounds.flatMap((round) => round.errors.flatMap(Object.entries)) as [string, number][]) {
    errors[message] = (errors[message] ?? 0) + count;
  }
  return {
    way: ways[name],
    perSecond: median(rounds.map((round) => round.answered / round.seconds)),
    p99: percentile(latencies, 0.99) as number,
    connectionsPerRequest: waits.length / answered,
    waitPerRequestMs: waits.reduce((total, wait) => total + wait, 0) / answered,
    waitP99Ms: percentile(waits, 0.99) ?? 0,
    transfers: sum((round) => round.transfers),
    failed: sum((round) => round.failed),
    lost: sum((round) => round.lost),
    half: sum((round) => round.half),
    storedAlthoughRefused: sum((round) => round.storedAlthoughRefused),
    errors,
  };
}

/** What the clients were told, against what is stored. */
async function compare(answers: ReadonlyMap<number, number>, knex: Knex) {
  const rows = await knex('entries').select('transfer').count('* as entries').groupBy('transfer');
  const stored = new Map(rows.map((row) => [Number(row['transfer']), Number(row['entries'])]));
  const counts = { transfers: answers.size, failed: 0, lost: 0, half: 0, storedAlthoughRefused: 0 };
  for (const [transfer, status] of answers) {
    const entries = stored.get(transfer) ?? 0;
    if (status !== 200 && status !== 422) counts.failed++;
    if (status === 200 && entries < 2) counts.lost++;
    if (entries === 1) counts.half++;
    if (status !== 200 && entries === 2) counts.storedAlthoughRefused++;
  }
  return counts;
}
