import { setTimeout as sleep } from 'node:timers/promises';
import type { PgBouncer } from '../tools/pgbouncer.mjs';
import { ScaleApp } from './scale-app';
import { format, median } from './statistics';
import { percentile, SteadyLoad } from './steady-load';

const ROUNDS = 3;
const ROUND_MS = 2_000;
const CLIENTS = 40;
const FILE = 'scale-cluster-server.mjs';

export interface WorkersFigures {
  processes: string;
  perSecond: number;
  timesFirst: number;
  p50: number;
  p99: number;
  /** Of all processes of the app together, microseconds per request. */
  cpu: number;
}

/** One process, and several workers of node:cluster behind PgBouncer: one SELECT each. */
export async function measureWorkers(url: string): Promise<{ report: string; figures: WorkersFigures[] }> {
  const pooler = await startPooler(url, { default_pool_size: 20 });
  const layouts = [
    { processes: 'one process, straight to PostgreSQL', workers: 0, database: url },
    { processes: 'one process behind PgBouncer', workers: 0, database: pooler.url },
    ...[1, 2, 4].map((workers) => ({
      processes: `${workers} worker${workers > 1 ? 's' : ''} behind PgBouncer`,
      workers,
      database: pooler.url,
    })),
  ];
  const runs: { app: ScaleApp; rounds: Awaited<ReturnType<typeof run>>[] }[] = [];
  try {
    for (const { workers, database } of layouts) {
      const app = await startApp(database, [workers, 10]);
      runs.push({ app, rounds: [] });
      await run(app);
    }
    for (let round = 0; round < ROUNDS; round++) {
      for (const { app, rounds } of runs) rounds.push(await run(app));
    }
  } finally {
    await Promise.all(runs.map(({ app }) => app.stop()));
    await pooler.stop();
  }
  const first = (runs[0] as { rounds: Awaited<ReturnType<typeof run>>[] }).rounds;
  const figures = layouts.map(({ processes }, i) => {
    const { rounds } = runs[i] as (typeof runs)[number];
    const latencies = rounds.flatMap((round) => round.latencies);
    return {
      processes,
      perSecond: median(rounds.map((round) => round.perSecond)),
      timesFirst: median(rounds.map((round, j) => round.perSecond / (first[j] as { perSecond: number }).perSecond)),
      p50: percentile(latencies, 0.5) as number,
      p99: percentile(latencies, 0.99) as number,
      cpu: median(rounds.map((round) => round.cpu)),
    };
  });
  const report = [
    `Several processes: one SELECT, ${CLIENTS} clients, pool of 10 in each process, PgBouncer ${pooler.version} with default_pool_size 20; median of ${ROUNDS} rounds of ${ROUND_MS / 1_000} s, interleaved`,
    '| | requests per second | times the first | p50 | p99 | CPU of the app per request |',
    '| --- | --- | --- | --- | --- | --- |',
    ...figures.map(
      (one) =>
        `| ${one.processes} | ${format(one.perSecond)} | ${format(one.timesFirst, 2)} | ${format(one.p50)} ms | ${format(one.p99)} ms | ${format(one.cpu)} us |`,
    ),
  ].join('\n');
  return { report, figures };
}

async function run(app: ScaleApp) {
  const load = await SteadyLoad.start({ port: app.port, connections: CLIENTS, requestOf: (n) => `GET /select/${(n % 1_000) + 1}` });
  try {
    await sleep(300);
    const before = await app.cpu();
    load.take();
    await sleep(ROUND_MS);
    const { answered, seconds, statuses, latencies } = load.take();
    const cpu = ((await app.cpu()) - before) / answered;
    if (statuses[200] !== answered) throw new Error(`Expected answers with 200 only, got ${JSON.stringify(statuses)}.`);
    return { perSecond: answered / seconds, latencies, cpu };
  } finally {
    await load.stop();
  }
}

export function startApp(database: string, args: number[]): Promise<ScaleApp> {
  process.env['BENCH_DATABASE_URL'] = database;
  return ScaleApp.start(FILE, args.map(String));
}

export async function startPooler(databaseUrl: string, settings: Record<string, number>): Promise<PgBouncer> {
  const { startPgBouncer } = await import('../tools/pgbouncer.mjs');
  return startPgBouncer({ databaseUrl, settings });
}
