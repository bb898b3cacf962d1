import { setTimeout as sleep } from 'node:timers/promises';
import { startApp, startPooler } from './scale-cluster';
import { format } from './statistics';
import { percentile, SteadyLoad } from './steady-load';

const WORKERS = 2;
const WORK_MS = 25;
const CLIENTS = 100;
const WINDOW_MS = 2_500;

/** What is asked of PgBouncer, and the pools of the workers. */
const cells = [
  ...[10, 20].flatMap((serverConnections) => [2, 5, 10, 20].map((poolSize) => ({ poolSize, serverConnections, clientConnections: 100 }))),
  { poolSize: 20, serverConnections: 20, clientConnections: 30 },
];

export interface PoolSizeFigures {
  poolSize: number;
  serverConnections: number;
  clientConnections: number;
  /** What the sizes allow, if nothing else is in the way. */
  possible: number;
  perSecond: number;
  p50: number;
  p99: number;
  failed: number;
}

/** The size of each worker's pool against what PgBouncer has to give: transactions that stay open for 25 ms. */
export async function measurePoolSizes(url: string): Promise<{ report: string; figures: PoolSizeFigures[] }> {
  const figures: PoolSizeFigures[] = [];
  for (const cell of cells) figures.push(await run(url, cell));
  const report = [
    `Pool sizes: ${WORKERS} workers, transactions of ${WORK_MS} ms, ${CLIENTS} clients, ${WINDOW_MS / 1_000} s each`,
    "| pool max of each worker | connections to PgBouncer | its max_client_conn | its default_pool_size | connections / transaction's time | requests per second | p50 | p99 | failed |",
    '| --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ...figures.map(
      (one) =>
        `| ${one.poolSize} | ${one.poolSize * WORKERS} | ${one.clientConnections} | ${one.serverConnections} | ${format(one.possible)} | ${format(one.perSecond)} | ${format(one.p50)} ms | ${format(one.p99)} ms | ${one.failed} |`,
    ),
  ].join('\n');
  return { report, figures };
}

async function run(url: string, cell: (typeof cells)[number]): Promise<PoolSizeFigures> {
  const { poolSize, serverConnections, clientConnections } = cell;
  const pooler = await startPooler(url, { default_pool_size: serverConnections, max_client_conn: clientConnections });
  const app = await startApp(pooler.url, [WORKERS, poolSize, WORK_MS]);
  const load = SteadyLoad.begin({ port: app.port, connections: CLIENTS, requestOf: (n) => `GET /work/${(n % 1_000) + 1}` });
  try {
    await sleep(1_500);
    load.take();
    await sleep(WINDOW_MS);
    const { answered, seconds, statuses, latencies } = load.take();
    const connections = Math.min(poolSize * WORKERS, serverConnections, clientConnections);
    return {
      ...cell,
      possible: (1_000 * connections) / WORK_MS,
      perSecond: (statuses[200] ?? 0) / seconds,
      p50: percentile(latencies, 0.5) as number,
      p99: percentile(latencies, 0.99) as number,
      failed: answered - (statuses[200] ?? 0),
    };
  } finally {
    await load.stop(0);
    await app.stop();
    await pooler.stop();
  }
}
