import { type Agent, request as nodeRequest } from 'node:http';
import { promisify } from 'node:util';
import type { Express } from 'express';
import { type Answer, get, keepAliveAgent, RawClient } from './support/http';
import { waysToLeave } from './support/leaving';
import { express4Flavour, express5Flavour, type Flavour, insert, openTransactions, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { bothOf, type WayToEnd, waysToEnd } from './support/ways-to-end';

failOnWarnings();
// Some 5 seconds together; much longer on a machine that is busy with other things.
jest.setTimeout(60_000);
const ledger = useLedger(5);
const seed = Number(process.env['SEED'] ?? Date.now() % 1_000_000);

// Scenario 40.
describe.each([
  { total: 2_000, flavour: express5Flavour },
  { total: 500, flavour: express4Flavour },
])('when $total requests end at random in every way, on $flavour.version', ({ total, flavour }) => {
  it(`leaves nothing behind, and the database agrees with what each client was told (SEED=${seed})`, async () => {
    const random = randomFrom(seed);
    const pick = <T>(items: readonly T[]): T => items[Math.floor(random() * items.length)] as T;
    const { port, url, server } = await ledger.serve(flavour, (app) => mountWays(app, flavour));

    /** Lets the request come to its end, on a connection that is used again. */
    const stay = async (way: WayToEnd, id: string, agent: Agent): Promise<Told> => {
      const answer = await get(urlOf(url, way, id, random), way.endsConnection ? {} : { agent });
      return { hasAnswer: true, problem: whyWrong(way, answer) };
    };
    /** Leaves at some moment: before, in the midst of it, after. */
    const leave = async (way: WayToEnd, id: string): Promise<Told> => {
      const [, go] = pick(waysToLeave);
      const client = await RawClient.connect(port);
      client.get(urlOf('', way, id, random));
      await new Promise((resolve) => setTimeout(resolve, random() * 20));
      await go(client);
      const status = Number(/^HTTP\/1\.1 (\d+)/.exec(client.received)?.[1] ?? 0);
      return { hasAnswer: status !== 0, problem: status === 0 || status === way.status ? undefined : `told ${status}` };
    };

    const asked = new Map<string, { way: WayToEnd; hasAnswer: boolean }>();
    const wrong: string[] = [];
    const queue = Array.from({ length: total }, (_, i) => `${i}`);
    const work = async (): Promise<void> => {
      const agent = keepAliveAgent();
      for (let id = queue.pop(); id !== undefined; id = queue.pop()) {
        const leaves = random() < 0.25;
        const way = leaves && random() < 0.3 ? hang : pick(waysToEnd);
        const { hasAnswer, problem } = await (leaves ? leave(way, id) : stay(way, id, agent));
        asked.set(id, { way, hasAnswer });
        if (problem) wrong.push(`${id}, ${way.name}${leaves ? ', left' : ''}: ${problem}`);
      }
      agent.destroy();
    };
    await Promise.all(Array.from({ length: 16 }, work));
    await ledger.isClean();
    const connections = promisify(server.getConnections.bind(server));
    await eventually(async () => expect(await connections()).toBe(0));

    const stored = new Set(await ledger.stored());
    for (const [id, { way, hasAnswer }] of asked) {
      const count = bothOf(id).filter((note) => stored.delete(note)).length;
      // Who leaves before the answer cannot know; but half of the work is never stored, nor what must not be.
      const allowed = { both: hasAnswer ? [2] : [0, 2], neither: [0], 'both or neither': [0, 2] }[way.stored];
      if (!allowed.includes(count)) wrong.push(`${id}, ${way.name}${hasAnswer ? '' : ', left'}: stored ${count} of 2`);
    }
    expect(wrong).toEqual([]);
    // No savepoint that was rolled back, nothing that nobody asked for.
    expect([...stored]).toEqual([]);
    expect(asked.size).toBe(total);
    expect(poolUsage(ledger.knex)).toMatchObject({ used: 0, pendingAcquires: 0 });
    expect(await openTransactions(ledger.database.admin)).toEqual([]);
  });
});

describe('when a write has been answered, and is read at once on another connection', () => {
  it('misses 0 rows in 2,000 pairs', async () => {
    const { url } = await ledger.serve(express5Flavour, (app) => {
      app.post('/:id', async (req, res) => {
        await insert(req, req.params.id);
        res.sendStatus(201);
      });
      app.get('/:id', async (req, res) => {
        res.json(await req.session('notes').where({ id: req.params.id }));
      });
    });
    let missed = 0;
    const pairs = async (lane: number): Promise<void> => {
      const [writer, reader] = [keepAliveAgent(), keepAliveAgent()];
      for (let i = 0; i < 500; i++) {
        const path = `${url}/${lane}-${i}`;
        expect(await headOf(path, writer)).toBe(201);
        const { body } = await get(path, { agent: reader });
        if (JSON.parse(body).length !== 1) missed++;
      }
      writer.destroy();
      reader.destroy();
    };
    await Promise.all([0, 1, 2, 3].map(pairs));
    expect(missed).toBe(0);
    expect(await ledger.stored()).toHaveLength(2_000);
  });
});

interface Told {
  hasAnswer: boolean;
  problem: string | undefined;
}

const hang: WayToEnd = {
  name: 'a handler that hangs',
  handler: async (req) => {
    for (const id of bothOf(String(req.query['id']))) await insert(req, id);
    await new Promise(() => {});
  },
  stored: 'neither',
};

function mountWays(app: Express, { route }: Flavour): void {
  for (const [i, { handler }] of [...waysToEnd, hang].entries()) app.get(`/${i}`, route(handler));
}

function urlOf(url: string, way: WayToEnd, id: string, random: () => number): string {
  return `${url}/${[...waysToEnd, hang].indexOf(way)}?id=${id}&pause=${Math.floor(random() * 5)}`;
}

function whyWrong(way: WayToEnd, { status, complete, error, body }: Answer): string | undefined {
  if (status === way.status && complete === !way.isCut) return undefined;
  return `told ${status}, ${complete ? 'complete' : 'cut off'} ${error?.code ?? ''} ${body.slice(0, 200)}`;
}

/** Settles with the status as soon as the head is there. */
function headOf(url: string, agent: Agent): Promise<number | undefined> {
  return new Promise((resolve, reject) => {
    const request = nodeRequest(url, { method: 'POST', agent }, (response) => resolve(response.resume().statusCode));
    request.once('error', reject).end();
  });
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
