import createKnex from 'knex';
import { Child } from './child';
import { sendRequests } from './load';
import { format, median, summary } from './statistics';

const REQUESTS = 1_500;
const CONNECTIONS = 10;
const ACCOUNTS = 1_000;

/** The apps of server.mjs, and how the report calls them. The others are compared with the first. */
const apps = {
  'by hand': 'knex.transaction() by hand',
  session: 'session',
  'no transaction': 'knex without a transaction',
} as const;
type Name = keyof typeof apps;
const names = Object.keys(apps) as Name[];

interface Contestant {
  server: Child;
  port: number;
  /** CPU microseconds of the server process for each request, one figure for each round. */
  cpu: number[];
  perSecond: number[];
}

/** One SELECT by key for each request: what it costs the server process. */
export async function measureOneSelect(
  url: string,
  { rounds, profileFolder }: { rounds: number; profileFolder?: string | undefined },
): Promise<string> {
  const knex = createKnex({ client: 'pg', connection: url });
  await createAccounts(knex);
  process.env['BENCH_DATABASE_URL'] = url;
  const contestants = new Map<Name, Contestant>();
  try {
    for (const name of names) {
      const server = new Child('server.mjs', [name], { profileFolder });
      const { port } = await server.ask<{ port: number }>('port');
      const contestant: Contestant = { server, port, cpu: [], perSecond: [] };
      contestants.set(name, contestant);
      // Warm-up: the first rounds are those of the compiler.
      for (let i = 0; i < 3; i++) await run(contestant);
    }
    for (let round = 0; round < rounds; round++) {
      // Each goes first in its turn.
      const order = names.map((_, i) => names[(i + round) % names.length] as Name);
      for (const name of order) await measure(contestants.get(name) as Contestant);
    }
  } finally {
    await Promise.all([...contestants.values()].map(({ server }) => server.stop()));
    await knex.schema.dropTable('accounts');
    await knex.destroy();
  }
  return report(contestants, rounds);
}

async function createAccounts(knex: ReturnType<typeof createKnex>): Promise<void> {
  await knex.schema.dropTableIfExists('accounts');
  await knex.schema.createTable('accounts', (table) => {
    table.integer('id').primary();
    table.text('name');
    table.integer('balance');
  });
  await knex.raw("INSERT INTO accounts SELECT id, 'account ' || id, id * 10 FROM generate_series(1, ?) AS id", [ACCOUNTS]);
  await knex.raw('ANALYZE accounts');
}

function run({ port }: Contestant): Promise<void> {
  return sendRequests((n) => `http://127.0.0.1:${port}/select/${(n % ACCOUNTS) + 1}`, { requests: REQUESTS, connections: CONNECTIONS });
}

async function measure(contestant: Contestant): Promise<void> {
  const before = await contestant.server.ask<NodeJS.CpuUsage>('cpu');
  const start = performance.now();
  await run(contestant);
  const seconds = (performance.now() - start) / 1_000;
  const after = await contestant.server.ask<NodeJS.CpuUsage>('cpu');
  contestant.cpu.push((after.user + after.system - before.user - before.system) / REQUESTS);
  contestant.perSecond.push(REQUESTS / seconds);
}

function report(contestants: Map<Name, Contestant>, rounds: number): string {
  const base = contestants.get('by hand') as Contestant;
  const lines = names.map((name) => {
    const { cpu, perSecond } = contestants.get(name) as Contestant;
    // Ratios within a round: the machine's mood of that moment is in both figures.
    const ratio = median(cpu.map((value, i) => value / (base.cpu[i] as number)));
    const throughput = median(perSecond.map((value, i) => value / (base.perSecond[i] as number)));
    return `  ${apps[name].padEnd(28)} ${summary(cpu).padStart(20)} us   ${format(ratio, 2)} of the CPU   ${format(throughput, 2)} times the requests per second`;
  });
  return [
    `One SELECT: CPU of the server process per request, median (and middle half) of ${rounds} rounds of ${format(REQUESTS)} requests on ${CONNECTIONS} connections`,
    ...lines,
  ].join('\n');
}
