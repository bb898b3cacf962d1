import type { Agent } from 'node:http';
import { promisify } from 'node:util';
import type { Request } from 'express';
import { get, keepAliveAgent, RawClient } from './support/http';
import { waysToLeave } from './support/leaving';
import { express5Flavour, insert, openTransactions, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { bothOf, type WayToEnd, waysToEnd } from './support/ways-to-end';

failOnWarnings();
// Some 5 seconds; much longer on a machine that is busy with other things.
jest.setTimeout(60_000);
const ledger = useLedger(5);
const seed = Number(process.env['SEED'] ?? Date.now() % 1_000_000);
const TOTAL = 1_000;

// Scenario 40, with deadlines.
describe(`when ${TOTAL} requests end at random in every way, some by a deadline and some by their client`, () => {
  it(`leaves nothing behind, and the database agrees with what each client was told (SEED=${seed})`, async () => {
    const random = randomFrom(seed);
    const pick = <T>(items: readonly T[]): T => items[Math.floor(random() * items.length)] as T;
    const reported: unknown[] = [];
    const { port, url, server } = await ledger.serve(
      express5Flavour,
      (app) => {
        for (const [i, { handler }] of ways.entries()) app.get(`/${i}`, handler);
      },
      {
        onError: (error) => reported.push(error),
        // Only of those that are to pass theirs: a busy machine is no fault.
        transactionTimeout: (req) => (limited.has(wayOf(req)) ? 30 : 30_000),
        acquireTimeout: (req) => (wayOf(req) === impatient ? 1 : 30_000),
      },
    );
    const urlOf = (way: Way, id: string): string => `/${ways.indexOf(way)}?id=${id}&pause=${Math.floor(random() * 5)}`;

    /** Lets the request come to its end, on a connection that is used again. */
    const stay = async (way: Way, id: string, agent: Agent): Promise<Told> => {
      // One that is never answered shall have a name.
      const signal = AbortSignal.timeout(20_000);
      const { status, complete, error } = await get(url + urlOf(way, id), { signal, ...(!way.endsConnection && { agent }) });
      const isRight = statusesOf(way).includes(status) && complete === !way.isCut;
      return { status, problem: isRight ? undefined : `told ${status}, ${complete ? 'complete' : 'cut off'} ${error?.code ?? ''}` };
    };
    /** Leaves at some moment: before, in the midst of it, after. */
    const leave = async (way: Way, id: string): Promise<Told> => {
      const [, go] = pick(waysToLeave);
      const client = await RawClient.connect(port);
      client.get(urlOf(way, id));
      await new Promise((resolve) => setTimeout(resolve, random() * 20));
      await go(client);
      const status = Number(/^HTTP\/1\.1 (\d+)/.exec(client.received)?.[1] ?? 0);
      return { status, problem: status === 0 || statusesOf(way).includes(status) ? undefined : `told ${status}` };
    };

    const asked = new Map<string, { way: Way; status: number }>();
    const wrong: string[] = [];
    const queue = Array.from({ length: TOTAL }, (_, i) => `${i}`);
    const work = async (): Promise<void> => {
      const agent = keepAliveAgent();
      for (let id = queue.pop(); id !== undefined; id = queue.pop()) {
        const way = random() < 0.08 ? pick(deadlineWays) : pick(ways);
        const isLeaving = random() < 0.25;
        const { status, problem } = await (isLeaving ? leave(way, id) : stay(way, id, agent));
        asked.set(id, { way, status });
        if (problem) wrong.push(`${id}, ${way.name}${isLeaving ? ', left' : ''}: ${problem}`);
      }
      agent.destroy();
    };
    await Promise.all(Array.from({ length: 16 }, work));
    await ledger.isClean();
    const connections = promisify(server.getConnections.bind(server));
    await eventually(async () => expect(await connections()).toBe(0));

    const stored = new Set(await ledger.stored());
    for (const [id, { way, status }] of asked) {
      const count = bothOf(id).filter((note) => stored.delete(note)).length;
      if (!countsOf(way, status).includes(count)) wrong.push(`${id}, ${way.name}, told ${status}: stored ${count} of 2`);
    }
    expect(wrong).toEqual([]);
    expect([...stored]).toEqual([]);
    expect(asked.size).toBe(TOTAL);
    expect(poolUsage(ledger.knex)).toMatchObject({ used: 0, pendingAcquires: 0 });
    expect(await openTransactions(ledger.database.admin)).toEqual([]);
    // Handlers that came back late, COMMITs that failed when nobody was there; but every ROLLBACK came through, in time.
    expect(reported.filter((error) => /settleTimeout/.test(String(error)))).toEqual([]);
  });
});

type Way = WayToEnd & { statuses?: number[] };

interface Told {
  /** 0 if no head came. */
  status: number;
  problem: string | undefined;
}

function statusesOf({ status, statuses }: Way): (number | undefined)[] {
  return statuses ?? [status];
}

/** How many of its two notes may be there. */
function countsOf(way: Way, status: number): number[] {
  if (way === impatient && status === 503) return [0];
  // Who leaves before the answer cannot know; but half of the work is never stored, nor what must not be.
  return { both: status ? [2] : [0, 2], neither: [0], 'both or neither': [0, 2] }[way.stored];
}

const write = async (req: Request): Promise<void> => {
  for (const id of bothOf(String(req.query['id']))) await insert(req, id);
};

const hanging: WayToEnd[] = [
  {
    name: 'a handler that hangs',
    async handler(req) {
      await write(req);
      await new Promise(() => {});
    },
    status: 503,
    stored: 'neither',
    endsConnection: true,
  },
  {
    name: 'a statement that does not end',
    async handler(req) {
      await write(req);
      await req.session.raw('SELECT pg_sleep(30)');
    },
    status: 503,
    stored: 'neither',
    endsConnection: true,
  },
  {
    name: 'a stream that stops',
    async handler(req) {
      await write(req);
      for await (const _row of req.session.raw('SELECT pg_sleep(i * 30) FROM generate_series(0, 1) i').stream({ batchSize: 1 }));
    },
    status: 503,
    stored: 'neither',
    endsConnection: true,
  },
  {
    name: 'a handler that hears the signal, and throws',
    async handler(req) {
      await write(req);
      await new Promise((_, reject) => req.session.signal.addEventListener('abort', () => reject(new Error('mine'))));
    },
    status: 503,
    stored: 'neither',
    endsConnection: true,
  },
];

const impatient: Way = {
  name: 'a request that does not wait for a connection',
  async handler(req, res) {
    await write(req);
    res.sendStatus(201);
  },
  statuses: [201, 503],
  stored: 'both',
};

const deadlineWays: Way[] = [
  ...hanging,
  impatient,
  {
    name: "the app's own timeout, and a late throw",
    async handler(req, res, next) {
      await write(req);
      const answered = new Promise((resolve) => res.once('close', resolve));
      next(Object.assign(new Error('timeout'), { status: 504 }));
      await answered;
      throw new Error('late');
    },
    status: 504,
    stored: 'neither',
  },
  {
    name: 'a throw beside a statement that does not end',
    async handler(req) {
      await write(req);
      req.session.raw('SELECT pg_sleep(30)').catch(() => {});
      throw new Error('mine');
    },
    status: 500,
    stored: 'neither',
  },
  {
    name: 'a success beside a statement that does not end',
    async handler(req, res) {
      await write(req);
      req.session.raw('SELECT pg_sleep(30)').catch(() => {});
      res.sendStatus(201);
    },
    status: 503,
    stored: 'neither',
    endsConnection: true,
  },
];

const limited = new Set<Way>([...hanging, deadlineWays.at(-1) as Way]);
const ways: Way[] = [...waysToEnd, ...deadlineWays];

function wayOf(req: Request): Way {
  return ways[Number(req.path.slice(1))] as Way;
}

/** mulberry32: the same numbers for the same seed. */
function randomFrom(start: number): () => number {
  let state = start;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4_294_967_296;
  };
}
