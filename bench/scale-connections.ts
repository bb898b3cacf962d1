import { setTimeout as sleep } from 'node:timers/promises';
import { ScaleApp } from './scale-app';
import { format, median } from './statistics';
import { percentile, SteadyLoad } from './steady-load';

const CONNECTIONS = [10, 100, 1_000, 4_000];
const ROUNDS = 3;
const ROUND_MS = 2_000;
/** How the clients ask: as fast as they are answered, or all together at this rate, which leaves the server time. */
const loads = {
  'all at once': undefined,
  '1,500 requests per second': 1_500,
} as const;
type Load = keyof typeof loads;
/** What the process needs besides its clients' sockets. */
const OTHER_FILES = 100;

/** How the report calls the apps. The others are compared with the first. */
const apps = {
  'no transaction': 'empty middleware, plain Knex',
  'by hand': 'empty middleware, `knex.transaction(cb)` by hand',
  session: 'this package',
} as const;
type Name = keyof typeof apps;
const names = Object.keys(apps) as Name[];

export interface ConnectionsFigures {
  app: string;
  load: Load;
  connections: number;
  /** Microseconds per request, one figure for each round. */
  cpu: number[];
  /** Against plain Knex, and against the same app with the fewest connections; medians of the ratios. */
  againstPlain: number;
  againstFewest: number;
  perSecond: number;
  p99: number;
  waiting: number;
}

interface Round {
  cpu: number;
  perSecond: number;
  latencies: number[];
  waiting: number;
}

/** CPU of the server process per request, one SELECT, pool of 10, with ever more clients. */
export async function measureConnections(profileFolder?: string): Promise<{ report: string; figures: ConnectionsFigures[] }> {
  const limit = openFilesLimit();
  const counts = CONNECTIONS.filter((count) => count + OTHER_FILES <= limit);
  const servers = new Map<Name, ScaleApp>();
  const rounds = new Map<string, Round[]>();
  try {
    for (const name of names) {
      const server = await ScaleApp.start('scale-server.mjs', [name, '10'], { profileFolder });
      servers.set(name, server);
      const load = await startLoad(server, 50, 'all at once');
      await sleep(3_000);
      await load.stop();
    }
    for (let round = 0; round < ROUNDS; round++) {
      for (const [count, load] of counts.flatMap((count) => (Object.keys(loads) as Load[]).map((load) => [count, load] as const))) {
        // Each goes first in its turn.
        for (const name of names.map((_, i) => names[(i + round) % names.length] as Name)) {
          const key = `${name} ${count} ${load}`;
          rounds.set(key, [...(rounds.get(key) ?? []), await run(servers.get(name) as ScaleApp, count, load)]);
        }
      }
    }
  } finally {
    await Promise.all([...servers.values()].map((server) => server.stop()));
  }
  const figures = (Object.keys(loads) as Load[]).flatMap((load) =>
    names.flatMap((name) => counts.map((count) => figuresOf({ name, load, count, fewest: counts[0] as number }, rounds))),
  );
  return { report: reportOf(figures, counts, limit), figures };
}

function startLoad({ port }: ScaleApp, connections: number, load: Load): Promise<SteadyLoad> {
  return SteadyLoad.start({ port, connections, perSecond: loads[load], requestOf: (n) => `GET /select/${(n % 1_000) + 1}` });
}

async function run(server: ScaleApp, count: number, kind: Load): Promise<Round> {
  const load = await startLoad(server, count, kind);
  try {
    // From here on every client has been answered once: no connection is made any more.
    await sleep(200);
    const before = await server.cpu();
    load.take();
    await sleep(ROUND_MS / 2);
    const waiting = await server.child.ask<number>('waiting');
    await sleep(ROUND_MS / 2);
    const { answered, seconds, statuses, latencies } = load.take();
    const cpu = ((await server.cpu()) - before) / answered;
    if (statuses[200] !== answered) throw new Error(`Expected answers with 200 only, got ${JSON.stringify(statuses)}.`);
    return { cpu, perSecond: answered / seconds, latencies, waiting };
  } finally {
    await load.stop();
  }
}

interface Measured {
  name: Name;
  load: Load;
  count: number;
  fewest: number;
}

function figuresOf({ name, load, count: connections, fewest }: Measured, rounds: ReadonlyMap<string, Round[]>): ConnectionsFigures {
  const of = (app: Name, count: number) => rounds.get(`${app} ${count} ${load}`) as Round[];
  const own = of(name, connections);
  // Ratios within a round: the machine's mood of that moment is in both figures.
  const ratioTo = (others: Round[]) => median(own.map(({ cpu }, i) => cpu / (others[i] as Round).cpu));
  return {
    app: apps[name],
    load,
    connections,
    cpu: own.map(({ cpu }) => cpu),
    againstPlain: ratioTo(of('no transaction', connections)),
    againstFewest: ratioTo(of(name, fewest)),
    perSecond: median(own.map(({ perSecond }) => perSecond)),
    p99: percentile(
      own.flatMap(({ latencies }) => latencies),
      0.99,
    ) as number,
    waiting: median(own.map(({ waiting }) => waiting)),
  };
}

function reportOf(figures: ConnectionsFigures[], counts: number[], limit: number): string {
  const lines = figures.map(
    ({ app, load, connections, cpu, againstPlain, againstFewest, perSecond, p99, waiting }) =>
      `| ${app} | ${load} | ${format(connections)} | ${rangeOf(cpu)} us | ${format(againstFewest, 2)} | ${format(againstPlain, 2)} | ${format(perSecond)} | ${format(p99)} ms | ${format(waiting)} |`,
  );
  const skipped = CONNECTIONS.filter((count) => !counts.includes(count));
  return [
    `CPU of the server process per request by concurrent connections: one SELECT, pool of 10, median (lowest to highest) of ${ROUNDS} rounds of ${ROUND_MS / 1_000} s, interleaved`,
    '| | requests | connections | CPU per request | against its own with 10 | against plain Knex with as many | requests per second | p99 | waiting for the pool |',
    '| --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ...lines,
    ...skipped.map(
      (count) => `  ${format(count)} left out: at most ${format(limit)} open files. Raise it first: ulimit -n ${count + OTHER_FILES}`,
    ),
  ].join('\n');
}

function rangeOf(values: number[]): string {
  return `${format(median(values))} (${format(Math.min(...values))} to ${format(Math.max(...values))})`;
}

function openFilesLimit(): number {
  const { userLimits } = process.report.getReport() as unknown as { userLimits: { open_files: { soft: number | 'unlimited' } } };
  // Not where there is no such limit to tell: Windows.
  const limit = Number(userLimits?.open_files?.soft);
  return Number.isNaN(limit) ? Number.POSITIVE_INFINITY : limit;
}
