import { setTimeout as sleep } from 'node:timers/promises';
import { PoolApp } from './pool-economy-app';
import { format, median } from './statistics';
import { percentile, SteadyLoad } from './steady-load';

const POOL_SIZE = 5;
const CLIENTS = 100;
const ROUNDS = 3;
const ROUND_MS = 2_500;

/** How the report calls the ways. The others are compared with the first. */
const ways = {
  eager: 'eager middleware: begins at once, commits on `finish`',
  'by hand': '`knex.transaction(cb)` around the handler',
  'by hand, late': '`knex.transaction(cb)` around the statement only',
  session: 'this package',
} as const;
type Name = keyof typeof ways;

export interface LateStatementFigures {
  way: string;
  perSecond: number;
  timesEager: number;
  p50: number;
  p99: number;
  waitedMs: number;
  failed: number;
}

/** 50 ms of other work before the first statement: who holds a connection meanwhile, and what that costs in throughput. */
export async function measureLateStatements(): Promise<{ report: string; figures: LateStatementFigures[] }> {
  const names = Object.keys(ways) as Name[];
  const runs = new Map(names.map((name) => [name, [] as Awaited<ReturnType<typeof run>>[]]));
  for (let round = 0; round < ROUNDS; round++) {
    for (const name of names) runs.get(name)?.push(await run(name));
  }
  const eager = runs.get('eager') as Awaited<ReturnType<typeof run>>[];
  const figures = names.map((name) => {
    const own = runs.get(name) as typeof eager;
    const latencies = own.flatMap((one) => one.latencies);
    return {
      way: ways[name],
      perSecond: median(own.map((one) => one.perSecond)),
      timesEager: median(own.map((one, i) => one.perSecond / (eager[i] as { perSecond: number }).perSecond)),
      p50: percentile(latencies, 0.5) as number,
      p99: percentile(latencies, 0.99) as number,
      waitedMs: median(own.flatMap((one) => one.waits)),
      failed: own.reduce((sum, one) => sum + one.failed, 0),
    };
  });
  const lines = figures.map(
    ({ way, perSecond, timesEager, p50, p99, waitedMs, failed }) =>
      `| ${way} | ${format(perSecond)} | ${format(timesEager, 1)} | ${format(p50)} ms | ${format(p99)} ms | ${format(waitedMs, 1)} ms | ${failed} |`,
  );
  const report = [
    `Pool of ${POOL_SIZE}, ${CLIENTS} clients, 50 ms of other work before the first statement: median of ${ROUNDS} rounds of ${ROUND_MS / 1_000} s, interleaved`,
    '| | requests per second | times eager | p50 | p99 | wait for a connection, median | failed |',
    '| --- | --- | --- | --- | --- | --- | --- |',
    ...lines,
  ].join('\n');
  return { report, figures };
}

/** A process of its own for each round: what one round leaves behind is not the next one's. */
async function run(name: Name) {
  const app = await PoolApp.start(name, { poolSize: POOL_SIZE });
  const load = await SteadyLoad.start({ port: app.port, connections: CLIENTS, requestOf: (n) => `GET /late/${n}` });
  try {
    await sleep(1_000);
    load.take();
    await app.figures();
    await sleep(ROUND_MS);
    const { answered, seconds, statuses, latencies } = load.take();
    const { waits } = await app.figures();
    return { perSecond: answered / seconds, latencies, waits, failed: answered - (statuses[200] ?? 0) };
  } finally {
    await load.stop(0);
    await app.stop();
  }
}
