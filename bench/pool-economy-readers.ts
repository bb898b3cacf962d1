import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Child } from './child';
import { PoolApp } from './pool-economy-app';
import { format, median } from './statistics';
import { percentile, SteadyLoad } from './steady-load';

const POOL_SIZE = 5;
const READERS = 200;
const BYTES_PER_SECOND = 10_000;
const OTHER_CLIENTS = 10;
const WITHOUT_MS = 5_000;
const WINDOW_MS = 10_000;
/** On a machine that has other things to do. */
const SETTLE_MS = 15_000;

const ways = {
  session: "this package (`commitAt: 'head'`)",
  'session at finish': "this package, `commitAt: 'finish'`",
  eager: 'eager middleware',
} as const;
type Name = keyof typeof ways;

export interface SlowReaderFigures {
  way: string;
  /** By the slow readers' requests, while nobody else asks. */
  held: number;
  waiting: number;
  /** Readers that are being served, and have not got all. */
  reading: number;
  bytesPerSecond: number;
  /** Of the other requests. */
  p99Without: number;
  p99With: number | undefined;
  perSecondWithout: number;
  perSecondWith: number;
  failed: number;
}

/**
 * 200 clients read 1 MB at 10 KB/s. All of it would take 100 s; what is measured is a window in which all of them are reading.
 *
 * They come over a socket of the file system: a TCP connection of the loopback takes the whole megabyte into the kernel's buffers at once,
 * which no client at the other end of a real network does, and nobody would notice that it is slow.
 */
export async function measureSlowReaders(): Promise<{ report: string; figures: SlowReaderFigures[] }> {
  const figures: SlowReaderFigures[] = [];
  for (const name of Object.keys(ways) as Name[]) figures.push(await run(name));
  const lines = figures.map(
    (one) =>
      `| ${one.way} | ${one.held} | ${one.waiting} | ${one.reading} | ${format(one.bytesPerSecond / 1_000, 1)} KB/s | ${inMs(one.p99Without)} | ${inMs(one.p99With)} | ` +
      `${format(one.perSecondWithout)} | ${format(one.perSecondWith)} | ${one.failed} |`,
  );
  const report = [
    `${READERS} clients read a response of 1 MB at ${BYTES_PER_SECOND / 1_000} KB/s, pool of ${POOL_SIZE}: a window of ${WINDOW_MS / 1_000} s; other requests: one SELECT, ${OTHER_CLIENTS} clients`,
    '| | connections held | requests waiting for one | clients reading | at | p99 of other requests, without readers | with them | per second, without | with | failed |',
    '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ...lines,
  ].join('\n');
  return { report, figures };
}

async function run(name: Name): Promise<SlowReaderFigures> {
  const folder = await mkdtemp(join(tmpdir(), 'bench-'));
  const slowSocket = join(folder, 'http');
  const app = await PoolApp.start(name, { poolSize: POOL_SIZE, slowSocket });
  const readers = new Child('slow-readers.mjs', [slowSocket, String(READERS), String(BYTES_PER_SECOND), '/large']);
  const options = { port: app.port, connections: OTHER_CLIENTS, requestOf: (n: number) => `GET /select/${n}` };
  try {
    const warmUp = await SteadyLoad.start(options);
    await sleep(2_000);
    warmUp.take();
    await sleep(WITHOUT_MS);
    const without = warmUp.take();
    await warmUp.stop();

    await readers.ask('start');
    const { used, waiting } = await settled(app);
    const early = await readers.ask<Reading[]>('bytes');
    const start = performance.now();
    const load = SteadyLoad.begin(options);
    await sleep(WINDOW_MS);
    const during = load.take();
    const late = await readers.ask<Reading[]>('bytes');
    const seconds = (performance.now() - start) / 1_000;
    await load.stop(0);

    const served = late.map(({ bytes, isClosed }, i) => ({
      read: bytes - (early[i] as Reading).bytes,
      isReading: !isClosed && bytes < 1_000_000,
    }));
    const reading = served.filter(({ read, isReading }) => read > 1_000 && isReading);
    return {
      way: ways[name],
      held: used,
      waiting,
      reading: reading.length,
      bytesPerSecond: median(reading.map(({ read }) => read / seconds)),
      p99Without: percentile(without.latencies, 0.99) as number,
      p99With: percentile(during.latencies, 0.99),
      perSecondWithout: without.answered / without.seconds,
      perSecondWith: (during.statuses[200] ?? 0) / during.seconds,
      failed: during.answered - (during.statuses[200] ?? 0),
    };
  } finally {
    await readers.stop();
    await app.stop();
    await rm(folder, { recursive: true, force: true });
  }
}

interface Reading {
  bytes: number;
  isClosed: boolean;
}

/** What stays as it is for a second: the readers have been served, as far as they will be. */
async function settled(app: PoolApp): Promise<{ used: number; waiting: number }> {
  const deadline = performance.now() + SETTLE_MS;
  let last = await app.pool();
  for (let same = 0; same < 20 && performance.now() < deadline; ) {
    await sleep(50);
    const now = await app.pool();
    same = now.used === last.used && now.waiting === last.waiting ? same + 1 : 0;
    last = now;
  }
  return last;
}

function inMs(value: number | undefined): string {
  return value === undefined ? 'no answer' : `${format(value, value < 100 ? 1 : 0)} ms`;
}
