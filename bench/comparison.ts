import createKnex from 'knex';
import { Child } from './child';
import { type Contestant, contestants, type RouteName, routeNames, routes } from './contestants';
import { Load } from './load';
import { round } from './statistics';
import { WireCounter } from './wire-counter';

/** Of the clients; each server's pool is as large (apps/data.mjs). */
export const CONNECTIONS = 10;
const ACCOUNTS = 10_000;
/** Requests before those that count, in each round: the others have had their turn in between. */
const RUN_UP = 0.5;
const WARM_UP = 5;
/** Of each contestant, by turns: what V8 makes of the same code differs between processes by up to 7 %. */
const PROCESSES = 2;

/** V8 drops hidden classes and compiled code where nothing is done for seconds: each waits for the others most of the time, as no busy server does. */
const STAYS_WARM = ['--no-memory-reducer', '--no-flush-bytecode'];

/** The figures of one contestant on one route: one for each round, and those of the wire. */
export interface Figures {
  /** CPU microseconds of the server process for each request. */
  cpu: number[];
  perSecond: number[];
  /** Latencies, in ms. */
  p50: number[];
  p99: number[];
  /** For each request. */
  roundTrips: number;
  heldMs: number[];
}

/** In place of figures: why there are none. */
export type Skipped = { skipped: string };
export type Measured = Record<RouteName, Record<string, Figures | Skipped>>;

export interface Selection {
  rounds: number;
  routes: readonly RouteName[];
  only: readonly string[];
  profileFolder?: string | undefined;
}

/** Runs the contestants by turns, each in processes of its own. */
export async function measureComparison(url: string, { rounds, routes: chosen, only, profileFolder }: Selection): Promise<Measured> {
  const knex = createKnex({ client: 'pg', connection: url });
  const measured = Object.fromEntries(routeNames.map((route) => [route, {}])) as Measured;
  const servers = new Map<string, Servers>();
  await createTables(knex);
  try {
    for (const name of only) {
      const profiled = await Server.start(name, url, profileFolder);
      const others = Array.from({ length: PROCESSES - 1 }, () => Server.start(name, url));
      servers.set(name, [profiled, ...(await Promise.all(others))]);
    }
    for (const route of chosen) {
      console.error(`${routes[route].title}: warm-up and ${rounds} rounds ...`);
      const running = new Map([...servers].filter(([name]) => !whySkipped(name, route)));
      for (const name of only) measured[route][name] = { skipped: whySkipped(name, route) ?? '' };
      await verify(route, running);
      const figures = await measureRoute(route, running, rounds);
      for (const [name] of running) Object.assign(measured[route], { [name]: figures.get(name) });
      await knex('entries').truncate();
    }
    console.error('On the wire ...');
    for (const name of only) await measureWire(name, url, chosen, measured);
  } finally {
    await Promise.all([...servers.values()].flat().map((server) => server.stop()));
    await knex.schema.dropTable('entries').dropTable('accounts');
    await knex.destroy();
  }
  return measured;
}

async function createTables(knex: ReturnType<typeof createKnex>): Promise<void> {
  await knex.schema.dropTableIfExists('entries').dropTableIfExists('accounts');
  await knex.schema.createTable('accounts', (table) => {
    table.integer('id').primary();
    table.text('name').notNullable();
    table.integer('balance').notNullable();
  });
  await knex.schema.createTable('entries', (table) => {
    table.increments('id');
    table.integer('account').notNullable();
    table.integer('amount').notNullable();
  });
  await knex.raw("INSERT INTO accounts SELECT id, 'account ' || id, id * 10 FROM generate_series(1, ?) AS id", [ACCOUNTS]);
  await knex.raw('VACUUM ANALYZE accounts');
}

/** The processes of a contestant. */
type Servers = readonly [Server, ...Server[]];

async function measureRoute(route: RouteName, servers: Map<string, Servers>, rounds: number): Promise<Map<string, Figures>> {
  const figures = new Map<string, Figures>();
  for (const [name, processes] of servers) {
    figures.set(name, { cpu: [], perSecond: [], p50: [], p99: [], roundTrips: 0, heldMs: [] });
    // Warm-up: the first rounds are those of the compiler.
    for (const server of processes) for (let i = 0; i < WARM_UP; i++) await server.measureAwake(route);
  }
  for (let round = 0; round < rounds; round++) {
    // Each goes first in its turn.
    const order = [...servers].map((_, i, all) => all[(i + round) % all.length] as [string, Servers]);
    for (const [name, processes] of order) {
      const server = processes[round % processes.length] as Server;
      const { cpu, perSecond, p50, p99 } = await server.measureAwake(route);
      const own = figures.get(name) as Figures;
      own.cpu.push(cpu);
      own.perSecond.push(perSecond);
      own.p50.push(p50);
      own.p99.push(p99);
    }
  }
  return figures;
}

/** The same request has the same answer everywhere. */
async function verify(route: RouteName, servers: Map<string, Servers>): Promise<void> {
  const answers: { name: string; answer: string }[] = [];
  for (const [name, [server]] of servers) answers.push({ name, answer: await server.answer(route) });
  const [first, ...others] = answers;
  for (const { name, answer } of others) {
    if (answer !== first?.answer)
      throw new Error(`${name} answers ${answer.slice(0, 300)} where ${first?.name} answers ${first?.answer.slice(0, 300)}`);
  }
}

/** One request after the other, through a proxy that counts. */
async function measureWire(name: string, url: string, chosen: readonly RouteName[], measured: Measured): Promise<void> {
  const counter = await WireCounter.start(url);
  const server = await Server.start(name, counter.url);
  try {
    for (const route of chosen) {
      const figures = measured[route][name] as Figures | Skipped;
      if (!('skipped' in figures)) Object.assign(figures, await awake(() => countOnWire(route, server, counter)));
    }
  } finally {
    await server.stop();
    await counter.close();
  }
}

async function countOnWire(route: RouteName, server: Server, counter: WireCounter): Promise<Pick<Figures, 'roundTrips' | 'heldMs'>> {
  const requests = Math.ceil(routes[route].requests / 50);
  const warmUp = await server.open(route, CONNECTIONS);
  await warmUp.run(Math.ceil(routes[route].requests / 2));
  warmUp.close();
  const oneByOne = await server.open(route, 1);
  await oneByOne.run(requests);
  const heldMs: number[] = [];
  let roundTrips = 0;
  for (let batch = 0; batch < BATCHES; batch++) {
    await counter.idle();
    counter.reset();
    await oneByOne.run(requests);
    await counter.idle();
    roundTrips += counter.roundTrips / requests / BATCHES;
    heldMs.push(counter.heldMs / requests);
  }
  oneByOne.close();
  return { roundTrips: round(roundTrips, 2), heldMs };
}
const BATCHES = 7;

function whySkipped(name: string, route: RouteName): string | undefined {
  return (contestants[name] as Contestant).without[route];
}

type RoundFigures = Record<'cpu' | 'perSecond' | 'p50' | 'p99', number>;

/** Where the processes are suspended for a while, servers drop the connections that they find idle: it is measured again. */
async function awake<Result>(measure: () => Promise<Result>): Promise<Result> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await measure();
    } catch (error) {
      if (!isDropped(error) || attempt === 3) throw error;
    }
  }
}

function isDropped(error: unknown): boolean {
  return error instanceof Error && 'code' in error && error.code === 'ECONNRESET';
}

/** A contestant's process. */
class Server {
  private constructor(
    private readonly child: Child,
    private readonly port: number,
  ) {}

  static async start(name: string, url: string, profileFolder?: string): Promise<Server> {
    const { app, settings = {} } = contestants[name] as Contestant;
    process.env['BENCH_DATABASE_URL'] = url;
    // pg tells of its queue, which is deprecated, once in each process.
    const execArgv = ['--no-deprecation', ...STAYS_WARM];
    const child = new Child('apps/server.mjs', [name, app, JSON.stringify(settings)], { execArgv, profileFolder });
    const { port } = await child.ask<{ port: number }>('port');
    return new Server(child, port);
  }

  open(route: RouteName, connections: number): Promise<Load> {
    return Load.open(this.port, connections, { method: routes[route].method, pathOf: (n) => pathOf(route, n) });
  }

  async answer(route: RouteName): Promise<string> {
    const response = await fetch(`http://127.0.0.1:${this.port}${pathOf(route, 41)}`, { method: routes[route].method });
    return `${response.status} ${response.headers.get('content-type')?.split(';', 1)} ${await response.text()}`;
  }

  measureAwake(route: RouteName): Promise<RoundFigures> {
    return awake(() => this.measure(route));
  }

  private async measure(route: RouteName): Promise<RoundFigures> {
    const { requests } = routes[route];
    const load = await this.open(route, CONNECTIONS);
    await load.run(Math.ceil(requests * RUN_UP));
    const before = await this.child.ask<NodeJS.CpuUsage>('cpu');
    const start = performance.now();
    const latencies = (await load.run(requests)).sort((a, b) => a - b);
    const seconds = (performance.now() - start) / 1_000;
    const after = await this.child.ask<NodeJS.CpuUsage>('cpu');
    load.close();
    return {
      cpu: (after.user + after.system - before.user - before.system) / requests,
      perSecond: requests / seconds,
      p50: latencies[Math.floor(requests * 0.5)] as number,
      p99: latencies[Math.floor(requests * 0.99)] as number,
    };
  }

  stop(): Promise<void> {
    return this.child.stop();
  }
}

/** Keys that leave nine more behind them. */
function pathOf(route: RouteName, n: number): string {
  return routes[route].path.replace(':id', String((n % (ACCOUNTS - 9)) + 1));
}
