import { Agent, get } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { Child } from './child';
import { format, median, summary } from './statistics';

const ROUNDS = 5;
const REQUESTS = 1_000;
/** Each has a connection of its own to the server. */
export const OPEN_SESSIONS = 100;

const kinds = {
  idle: { of: 'a session that is never used', requests: REQUESTS },
  'open-session': { of: 'an open session', requests: OPEN_SESSIONS },
  'open-knex': { of: 'an open `knex.transaction(cb)`', requests: OPEN_SESSIONS },
  'waiting-session': { of: 'a session that waits for a connection', requests: REQUESTS },
  'waiting-knex': { of: 'a `knex.transaction(cb)` that waits for a connection', requests: REQUESTS },
} as const;

export interface MemoryFigures {
  of: string;
  requests: number;
  /** More than the same request without any of it, one figure for each round. */
  bytes: number[];
}

/** What a request keeps of the heap while its handler waits, less what it keeps in an app without database. */
export async function measureMemory(): Promise<{ report: string; figures: MemoryFigures[] }> {
  const child = new Child('scale-memory-server.mjs', [String(OPEN_SESSIONS)], { execArgv: ['--expose-gc'] });
  const agent = new Agent({ keepAlive: true, maxSockets: REQUESTS, maxFreeSockets: REQUESTS });
  const figures: MemoryFigures[] = Object.values(kinds).map((kind) => ({ ...kind, bytes: [] }));
  try {
    const { port } = await child.ask<{ port: number }>('port');
    const measure = (path: string, requests: number) => bytesOf(child, { url: `http://127.0.0.1:${port}`, path, requests, agent });
    // The first rounds make hidden classes and compiled code, and the connections of the pool.
    for (let round = -2; round < ROUNDS; round++) {
      const without: Record<number, number> = {
        [REQUESTS]: await measure('nothing', REQUESTS),
        [OPEN_SESSIONS]: await measure('nothing', OPEN_SESSIONS),
      };
      for (const [i, path] of Object.keys(kinds).entries()) {
        const { requests, bytes } = figures[i] as MemoryFigures;
        const more = (await measure(path, requests)) - (without[requests] as number);
        if (round >= 0) bytes.push(more);
      }
    }
  } finally {
    agent.destroy();
    await child.stop();
  }
  const report = [
    `Memory: heap of the server process for each request that is there at once, more than without a database; median (and middle half) of ${ROUNDS} rounds`,
    '| | at once | bytes each |',
    '| --- | --- | --- |',
    ...figures.map(({ of, requests, bytes }) => `| ${of} | ${format(requests)} | ${summary(bytes)} |`),
    `  open, against Knex: ${format(medianOf(figures, 1) / medianOf(figures, 2), 2)}; waiting: ${format(medianOf(figures, 3) / medianOf(figures, 4), 2)}`,
  ].join('\n');
  return { report, figures };
}

function medianOf(figures: MemoryFigures[], index: number): number {
  return median((figures[index] as MemoryFigures).bytes);
}

interface Holding {
  url: string;
  path: string;
  requests: number;
  agent: Agent;
}

async function bytesOf(child: Child, { url, path, requests, agent }: Holding): Promise<number> {
  // The sockets are there before and after.
  await Promise.all(Array.from({ length: REQUESTS }, () => send(`${url}/ready`, agent)));
  const before = await child.ask<number>('prepare');
  const answers = Promise.all(Array.from({ length: requests }, () => send(`${url}/${path}`, agent)));
  while ((await child.ask<number>('held')) < requests) await sleep(20);
  // For what follows upon the last one's arrival.
  await sleep(100);
  const after = await child.ask<number>('heap');
  await child.ask('release');
  await answers;
  return (after - before) / requests;
}

function send(url: string, agent: Agent): Promise<void> {
  return new Promise((resolve, reject) => {
    get(url, { agent }, (res) => {
      res.resume();
      if (res.statusCode !== 200) reject(new Error(`${url} was answered with ${res.statusCode}`));
      else res.once('end', resolve);
    }).on('error', reject);
  });
}
