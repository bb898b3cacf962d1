/*
 * What a request keeps as long as it lasts, in a process of its own: handlers that wait until they are let go.
 * The first argument is how many sessions are open at once at most.
 */
import { once } from 'node:events';
import { setImmediate as turn } from 'node:timers/promises';
import express from 'express';
import { sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import createKnex from 'knex';

const [open = '100'] = process.argv.slice(2);
const WAIT_MS = 60_000;
const settings = { client: 'pg', connection: process.env['BENCH_DATABASE_URL'] ?? '', acquireConnectionTimeout: WAIT_MS };
const large = createKnex({ ...settings, pool: { min: 0, max: Number(open) } });
const full = createKnex({ ...settings, pool: { min: 0, max: 2 } });

let held = 0;
/** @type {Promise<void>} */
let letGo;
/** @type {() => void} */
let release;
/** @type {unknown[]} */
let taken = [];

async function prepare() {
  taken = [await full.client.acquireConnection(), await full.client.acquireConnection()];
  held = 0;
  letGo = new Promise((resolve) => {
    release = resolve;
  });
}

async function hold() {
  held++;
  await letGo;
}

const ofLarge = sessionMiddleware(large, { acquireTimeout: WAIT_MS, transactionTimeout: WAIT_MS });
const ofFull = sessionMiddleware(full, { acquireTimeout: WAIT_MS, transactionTimeout: WAIT_MS });
/** @type {import('express').RequestHandler} */
const empty = (_req, _res, next) => next();

/** @type {Record<string, import('express').RequestHandler[]>} */
const routes = {
  nothing: [empty, () => hold()],
  idle: [ofLarge, () => hold()],
  'open-session': [
    ofLarge,
    async (req) => {
      await req.session('accounts').where('id', 1).first();
      await hold();
    },
  ],
  'open-knex': [
    empty,
    () =>
      large.transaction(async (trx) => {
        await trx('accounts').where('id', 1).first();
        await hold();
      }),
  ],
  'waiting-session': [
    ofFull,
    async (req) => {
      held++;
      await req.session('accounts').where('id', 1).first();
    },
  ],
  'waiting-knex': [
    empty,
    async () => {
      held++;
      await full.transaction((trx) => trx('accounts').where('id', 1).first());
    },
  ],
};

const app = express();
app.disable('etag');
app.get('/ready', (_req, res) => res.sendStatus(200));
for (const [path, [middleware, handler]] of Object.entries(routes)) {
  const [before, work] = /** @type {import('express').RequestHandler[]} */ ([middleware, handler]);
  app.get(`/${path}`, /** @type {import('express').RequestHandler} */ (before), async (req, res, next) => {
    await work?.(req, res, next);
    res.sendStatus(200);
  });
}
app.use(sessionErrorHandler());

const server = app.listen({ port: 0, host: '127.0.0.1', backlog: 4_096 });
server.keepAliveTimeout = 600_000;
await once(server, 'listening');

/** @type {Record<string, () => unknown>} */
const answers = {
  port: () => server.address(),
  async prepare() {
    await prepare();
    return answers['heap']?.();
  },
  held: () => held,
  async heap() {
    for (let round = 0; round < 4; round++) {
      globalThis.gc?.();
      await turn();
    }
    return process.memoryUsage().heapUsed;
  },
  async release() {
    release();
    for (const connection of taken) await full.client.releaseConnection(connection);
  },
};
process.on('message', async (/** @type {string} */ question) => {
  const answer = answers[question];
  if (answer) process.send?.((await answer()) ?? null);
  else process.exit();
});
