import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Socket } from 'node:net';
import { performance } from 'node:perf_hooks';
import express, { type RequestHandler } from 'express';
import { sessionMiddleware, sessionOptions } from 'express-knex-session';
import createKnex, { type Knex } from 'knex';
import { format, median, summary } from './statistics';

const REQUESTS = 100;
const DELAY_MS = 5;

/** How long one SELECT takes where the database is far away: what a round trip more costs. */
export async function measureCheapReads(url: string, { rounds }: { rounds: number }): Promise<string> {
  const proxy = await startSlowProxy(url);
  const knex = createKnex({ client: 'pg', connection: proxy.url, pool: { min: 1, max: 2 } });
  const ways = waysOf(knex);
  const { port, close } = await listen(ways);
  const latencies = Object.keys(ways).map((name) => ({ name, ms: [] as number[] }));
  try {
    for (const index of latencies.keys()) await latency(port, index);
    for (let round = 0; round < rounds; round++) {
      for (const [index, { ms }] of latencies.entries()) ms.push(await latency(port, index));
    }
  } finally {
    await close();
    await knex.destroy();
    proxy.close();
  }
  const plain = median((latencies[0] as { ms: number[] }).ms);
  const lines = latencies.map(({ name, ms }) => `  ${name.padEnd(34)} ${summary(ms, 1)} ms   ${format(median(ms) / plain, 2)}`);
  const title = `One SELECT, ${DELAY_MS} ms from the database and back: median (and middle half) of ${rounds} rounds of ${REQUESTS} requests, one after the other`;
  return [title, ...lines].join('\n');
}

/** The others are compared with the first. */
function waysOf(knex: Knex): Record<string, RequestHandler[]> {
  const bySession: RequestHandler = async (req, res) => res.json((await req.session.raw('SELECT 1 AS one')).rows);
  const session = sessionMiddleware(knex);
  return {
    'knex without a transaction': [async (_req, res) => res.json((await knex.raw('SELECT 1 AS one')).rows)],
    'session, { transaction: false }': [session, sessionOptions({ transaction: false }), bySession],
    'session, { readOnly: true }': [session, sessionOptions({ readOnly: true }), bySession],
    session: [session, bySession],
    'knex.transaction() by hand': [
      async (_req, res) => {
        const { rows } = await knex.transaction((trx) => trx.raw('SELECT 1 AS one'));
        res.json(rows);
      },
    ],
  };
}

async function listen(ways: Record<string, RequestHandler[]>) {
  const app = express();
  for (const [index, handlers] of Object.values(ways).entries()) app.get(`/${index}`, ...handlers);
  const server = app.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  const close = async (): Promise<void> => {
    const closed = once(server.close(), 'close');
    server.closeAllConnections();
    await closed;
  };
  return { port, close };
}

/** The median of some requests, in ms. */
async function latency(port: number, index: number): Promise<number> {
  const all: number[] = [];
  for (let i = 0; i < REQUESTS; i++) {
    const start = performance.now();
    const response = await fetch(`http://127.0.0.1:${port}/${index}`);
    await response.text();
    if (!response.ok) throw new Error(`${index}: ${response.status}`);
    all.push(performance.now() - start);
  }
  return median(all);
}

/** What the server answers arrives later. */
async function startSlowProxy(databaseUrl: string) {
  const target = new URL(databaseUrl);
  const sockets = new Set<Socket>();
  const server = createServer((client) => {
    const upstream = connect({ host: target.hostname, port: Number(target.port || 5432), noDelay: true });
    for (const socket of [client.setNoDelay(true), upstream]) {
      sockets.add(socket);
      socket.on('error', () => {}).once('close', () => sockets.delete(socket));
    }
    client.pipe(upstream);
    upstream.on('data', (bytes) => setTimeout(() => client.write(bytes), DELAY_MS));
    upstream.once('close', () => client.destroy());
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const url = new URL(databaseUrl);
  url.host = `127.0.0.1:${(server.address() as AddressInfo).port}`;
  return {
    url: url.href,
    close() {
      server.close();
      for (const socket of sockets) socket.destroy();
    },
  };
}
