import { setTimeout as sleep } from 'node:timers/promises';
import type { Postgres } from '../tools/postgres.mjs';
import { Child } from './child';
import type { ClientSettings } from './clients';
import { Faults, queryOnce } from './faults';
import { type RequestRecord, stormSettings } from './kinds';
import { Network } from './network';
import { Random } from './random';
import { type Report, reportOf } from './report';
import { busyBackends, schema } from './schema';
import type { ServerFigures, ServerSettings } from './server';

export interface StormOptions {
  seconds: number;
  seed: number;
  /** Of the package, as TypeScript. */
  libFolder: string;
}

/** What is known when all is over; {@link reportOf} makes figures of it. */
export interface Aftermath {
  options: StormOptions;
  faults: Record<string, number>;
  /** Of the storm, and of the drain after it. */
  records: RequestRecord[];
  calm: RequestRecord[];
  /** When the storm had passed. */
  quiet: ServerFigures & { backends: { state: string; query: string }[] };
  drain: { patienceMs: number; ms: number; open: number };
  /** At the very end. */
  last: ServerFigures;
  databaseUrl: string;
}

/** A storm on a server, an app and clients of its own; then the peace after it, and what is left. */
export async function runStorm(options: StormOptions): Promise<Report> {
  const { startPostgres } = await import('../tools/postgres.mjs');
  const postgres = await startPostgres({
    settings: {
      max_connections: 50,
      // A process that is killed does not need the disk, but COMMIT must be written before it is answered.
      fsync: 'off',
      synchronous_commit: 'on',
      // For connections that are cut in a statement: nobody is left who could cancel it.
      client_connection_check_interval: 250,
      deadlock_timeout: 200,
    },
  });
  const network = new Network(postgres.url, new Random(options.seed + 1));
  await network.start();
  await queryOnce(postgres.url, schema);
  const children: Child[] = [];
  try {
    const settings: ServerSettings = { databaseUrl: network.url, libFolder: options.libFolder, deadlines: stormSettings.deadlines };
    const app = new Child('server.ts', settings);
    children.push(app);
    const records: RequestRecord[] = [];
    const clientSettings: ClientSettings = { port: await app.ask('port'), seed: options.seed, pauseMs: 40, slowReaders: 1 };
    const clients = new Child('clients.ts', clientSettings, { onNews: (news: RequestRecord[]) => records.push(...news) });
    children.push(clients);

    const faults = new Faults(new Random(options.seed), network, postgres);
    await clients.ask('start');
    // If the app's process dies, the storm is over.
    await Promise.race([faults.rage(options.seconds), app.died]);
    await clients.ask('stop');

    const quiet = await untilQuiet(app, postgres);
    const calm = await clients.ask<RequestRecord[]>('each', 'calm');
    const drain = await drainUnderLoad(app, clients);
    const last = await app.ask<ServerFigures>('figures');
    return await reportOf({ options, faults: faults.counts, records, calm, quiet, drain, last, databaseUrl: postgres.url });
  } finally {
    for (const child of children) await child.stop();
    await network.close();
    await postgres.stop();
  }
}

/** All must be at rest within the deadlines; if not, this is how it was found. */
async function untilQuiet(app: Child, postgres: Postgres): Promise<Aftermath['quiet']> {
  const { deadlines, slackMs } = stormSettings;
  const end = performance.now() + deadlines.acquireTimeout + deadlines.transactionTimeout + deadlines.settleTimeout + slackMs;
  for (;;) {
    const figures = await app.ask<ServerFigures>('figures');
    const backends = await queryOnce<{ state: string; query: string }>(postgres.url, busyBackends);
    const isQuiet = figures.used + figures.waiting + backends.length + figures.stats.open + figures.stats.waiting === 0;
    if (isQuiet || performance.now() > end) return { ...figures, backends };
    await sleep(50);
  }
}

async function drainUnderLoad(app: Child, clients: Child): Promise<Aftermath['drain']> {
  await clients.ask('start');
  await sleep(500);
  const patienceMs = 300;
  const drained = await app.ask<{ ms: number; open: number }>('drain', patienceMs);
  await clients.ask('stop');
  return { patienceMs, ...drained };
}
