/*
 * npm run soak: very many requests with good and bad ends, on a good network; then what the app's process keeps of them.
 * Ends with 1 if that grows.
 */
import { randomInt } from 'node:crypto';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { readArguments, UsageError } from './arguments';
import { Child } from './child';
import type { ClientSettings } from './clients';
import { queryOnce } from './faults';
import type { RequestRecord } from './kinds';
import type { Resources } from './resources';
import { schema } from './schema';
import type { ServerFigures, ServerSettings } from './server';

const usage = `npm run soak -- [--requests 200000] [--seed <number>]
  --requests  how many, after a warm-up of a tenth of them
  --seed      repeats the requests of another run`;

const SAMPLES = 10;
/** As a share of the heap after the warm-up. */
const HEAP_GROWTH_LIMIT = 0.03;

async function main(): Promise<void> {
  const given = readArguments(usage, { requests: 'number', seed: 'number' });
  const { requests = 200_000, seed = randomInt(2 ** 31) } = given;
  console.error(`seed ${seed}`);
  const samples = await soak(requests, seed);
  const failures = growthOf(samples);
  for (const failure of failures) console.error(failure);
  process.exitCode = failures.length === 0 ? 0 : 1;
}

async function soak(requests: number, seed: number): Promise<Resources[]> {
  const { startPostgres } = await import('../tools/postgres.mjs');
  const postgres = await startPostgres({ settings: { fsync: 'off', synchronous_commit: 'off' } });
  await queryOnce(postgres.url, schema);
  const settings: ServerSettings = {
    databaseUrl: postgres.url,
    libFolder: join(__dirname, '..', 'lib'),
    deadlines: { acquireTimeout: 300, transactionTimeout: 200, settleTimeout: 500 },
  };
  // Optimized code is part of the heap, and V8 goes on making it for a hundred thousand requests.
  const app = new Child('server.ts', settings, { execArgv: ['--expose-gc', '--no-opt'] });
  let count = 0;
  const onNews = (records: RequestRecord[]) => {
    count += records.length;
  };
  // The slow ones less often: it is the number that counts.
  const weights = { slow: 1, manyRows: 0.1, overtaken: 0.5, hung: 0.2, hungLate: 0.2, hungStatement: 0.2, givenUp: 0.2 };
  const clientSettings: ClientSettings = { port: await app.ask('port'), seed, pauseMs: 0, slowReaders: 0.1, weights };
  const clients = new Child('clients.ts', clientSettings, { onNews });
  try {
    const samples: Resources[] = [];
    console.log(row('requests', ...Object.keys(labels)));
    for (let sample = 0; sample <= SAMPLES; sample++) {
      await clients.ask('start');
      while (count < ((sample + 1) * requests) / SAMPLES) {
        await Promise.race([sleep(100), app.died, clients.died]);
      }
      await clients.ask('stop');
      await atRest(app);
      const resources = await app.ask<Resources>('resources');
      samples.push(resources);
      console.log(row(count, ...Object.values(labels).map((value) => value(resources))));
    }
    return samples;
  } finally {
    for (const child of [app, clients]) await child.stop();
    await postgres.stop();
  }
}

/** Late handlers end; connections go back. */
async function atRest(app: Child): Promise<void> {
  for (let quietRounds = 0; quietRounds < 5; ) {
    const { used, waiting, stats } = await app.ask<ServerFigures>('figures');
    quietRounds = used + waiting + stats.open + stats.waiting === 0 ? quietRounds + 1 : 0;
    await sleep(100);
  }
}

const labels: Record<string, (resources: Resources) => number> = {
  'heap, kB': ({ heapBytes }) => Math.round(heapBytes / 1024),
  sockets: ({ sockets }) => sockets,
  '/socket': ({ listenersOnSocket }) => listenersOnSocket,
  '/pg client': ({ listenersOnConnection }) => listenersOnConnection,
  '/server': ({ listenersOnServer }) => listenersOnServer,
  '/pool': ({ listenersOnPool }) => listenersOnPool,
  '/process': ({ listenersOnProcess }) => listenersOnProcess,
  timers: ({ timers }) => timers,
};

function row(...cells: (string | number)[]): string {
  return cells.map((cell) => String(cell).padStart(11)).join('');
}

/** Compares the first three samples after the warm-up with the last three. */
function growthOf([, ...samples]: Resources[]): string[] {
  const early = samples.slice(0, 3);
  const late = samples.slice(-3);
  const heapOf = (some: Resources[]) => some.map(({ heapBytes }) => heapBytes).sort((one, other) => one - other)[1] as number;
  const growth = heapOf(late) / heapOf(early) - 1;
  console.log(`\nheap after GC: ${(growth * 100).toFixed(2)} % (at most ${HEAP_GROWTH_LIMIT * 100} %)`);
  const failures = growth > HEAP_GROWTH_LIMIT ? ['The heap grows.'] : [];
  for (const name of [
    'listenersOnSocket',
    'listenersOnConnection',
    'listenersOnServer',
    'listenersOnPool',
    'listenersOnProcess',
    'timers',
  ] as const) {
    const [before, after] = [early, late].map((some) => Math.max(...some.map((sample) => sample[name]))) as [number, number];
    console.log(`${name}: ${before} before, ${after} after`);
    if (after > before) failures.push(`${name} grow.`);
  }
  return failures;
}

main().catch((error: unknown) => {
  console.error(error instanceof UsageError ? error.message : error);
  process.exitCode = 2;
});
