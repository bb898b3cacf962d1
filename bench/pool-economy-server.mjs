/*
 * For the table of pool economy: one app, in each of the ways in which its handlers may come by a connection, in a process of its own.
 * Its name is the first argument, the size of its pool the second. It listens on a TCP port, and on a socket of the file system, for those who read slowly.
 */
import { once } from 'node:events';
import { createServer } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import express from 'express';
import { sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import createKnex from 'knex';
import { eagerMiddleware } from './pool-economy-eager.mjs';

/** @typedef {import('knex').Knex} Knex */
/** @typedef {<T>(statement: (db: Knex) => PromiseLike<T>) => PromiseLike<T>} Run */
/** @typedef {{ before: () => Promise<unknown>, statements: (run: Run) => Promise<unknown> }} Work */
/** @typedef {{ mount?: (app: import('express').Express) => void, do: (work: Work, req: import('express').Request) => Promise<unknown> }} Way */

const [name = '', poolSize = '5', slowSocket] = process.argv.slice(2);
const knex = createKnex({
  client: 'pg',
  connection: process.env['BENCH_DATABASE_URL'] ?? '',
  pool: { min: 0, max: Number(poolSize) },
  // As long as the package waits, so that the ways give up at the same time.
  acquireConnectionTimeout: 5_000,
  log: { warn() {}, error() {} },
});

/** All statements on one thing. @param {Knex} db @returns {Run} */
const on = (db) => (statement) => statement(db);

/** @param {Parameters<typeof sessionMiddleware>[1]} [options] @returns {Way} */
const session = (options) => ({
  mount: (app) => app.use(sessionMiddleware(knex, { onError() {}, ...options })),
  do: async ({ before, statements }, req) => {
    await before();
    return statements(on(req.session));
  },
});

/** @type {Promise<import('knex').Knex.Transaction> | undefined} */
let shared;

/** @type {Record<string, Way>} */
const ways = {
  session: session(),
  'session at finish': session({ commitAt: 'finish' }),

  eager: {
    mount: (app) => app.use(eagerMiddleware(knex)),
    do: async ({ before, statements }, req) => {
      await before();
      return statements(on(/** @type {any} */ (req).trx));
    },
  },

  'by hand': {
    do: ({ before, statements }) =>
      knex.transaction(async (trx) => {
        await before();
        return statements(on(trx));
      }),
  },

  'by hand, late': {
    do: async ({ before, statements }) => {
      await before();
      return knex.transaction((trx) => statements(on(trx)));
    },
  },

  'each statement on the pool': {
    do: async ({ before, statements }) => {
      await before();
      return statements(on(knex));
    },
  },

  'each statement withSession': {
    do: async ({ before, statements }) => {
      await before();
      return statements((statement) => withSession(knex, async (db) => statement(db)));
    },
  },

  // Commits when a request is done, and begins anew with the next: never committing would be no way at all.
  'one transaction for all': {
    do: async ({ before, statements }) => {
      await before();
      shared ??= knex.transaction();
      const mine = shared;
      const trx = await mine;
      try {
        const body = await statements(on(trx));
        await trx.commit();
        return body;
      } catch (error) {
        await trx.rollback();
        throw error;
      } finally {
        if (shared === mine) shared = undefined;
      }
    },
  },
};

const way = /** @type {Way} */ (ways[name]);
const megabyte = 'x'.repeat(1_000_000);
const nothing = async () => {};
/** @param {number} id @returns {(db: Knex) => PromiseLike<any>} */
const account = (id) => (db) => db('accounts').where({ id }).first();

/** @type {Record<string, (n: number) => Work>} */
const routes = {
  /** 50 ms of other work first: a call of another service, a password's hash. */
  late: (n) => ({ before: () => sleep(50), statements: async (run) => run(account((n % 1_000) + 1)) }),
  select: (n) => ({ before: nothing, statements: async (run) => run(account((n % 1_000) + 1)) }),
  large: (n) => ({
    before: nothing,
    async statements(run) {
      await run(account((n % 1_000) + 1));
      return megabyte;
    },
  }),
  /** Two entries that belong together, and one request of twenty that fails between them. */
  transfer: (n) => ({
    before: nothing,
    async statements(run) {
      const [from, to] = [(n % 1_000) + 1, ((n * 7) % 1_000) + 1];
      const [one, other] = [await run(account(from)), await run(account(to))];
      await run((db) => db('entries').insert({ transfer: n, account: one.id, amount: -1 }));
      if (n % 20 === 0) throw Object.assign(new Error('Refused.'), { status: 422 });
      await run((db) => db('entries').insert({ transfer: n, account: other.id, amount: 1 }));
      return { transfer: n };
    },
  }),
};

const app = express();
app.disable('etag');
way.mount?.(app);
for (const [path, workOf] of Object.entries(routes)) {
  app.all(`/${path}/:n`, async (req, res) => {
    res.send(await way.do(workOf(Number(req.params.n)), req));
  });
}
if (name.startsWith('session')) app.use(sessionErrorHandler());
/** @type {import('express').ErrorRequestHandler} */
const answerError = (error, _req, res, next) => {
  if (res.headersSent) return next(error);
  const message = error.status === 422 ? 'refused' : String(error.message);
  if (error.status !== 422) errors[kindOf(message)] = (errors[kindOf(message)] ?? 0) + 1;
  res.status(error.status ?? 500).json({ message });
};
app.use(answerError);

/** @type {Record<string, number>} */
let errors = {};
/** @param {string} message */
const kindOf = (message) => (message.includes(' - ') ? message.slice(message.lastIndexOf(' - ') + 3) : message);

const { pool } = knex.client;
/** @type {Map<number, number>} */
const waiting = new Map();
/** @type {number[]} */
let waits = [];
pool.on('acquireRequest', (/** @type {number} */ id) => waiting.set(id, performance.now()));
for (const event of ['acquireSuccess', 'acquireFail']) {
  pool.on(event, (/** @type {number} */ id) => {
    waits.push(performance.now() - /** @type {number} */ (waiting.get(id)));
    waiting.delete(id);
  });
}

const server = app.listen(0, '127.0.0.1');
const slowServer = createServer(app);
if (slowSocket) slowServer.listen(slowSocket);
await Promise.all([once(server, 'listening'), slowSocket && once(slowServer, 'listening')]);

/** @type {Record<string, () => unknown>} */
const answers = {
  port: () => server.address(),
  /** Now. */
  pool: () => ({ used: pool.numUsed(), waiting: pool.numPendingAcquires() }),
  /** Since it was last asked. */
  figures() {
    const figures = { waits, errors };
    waits = [];
    errors = {};
    return figures;
  },
};
process.on('message', (/** @type {string} */ question) => {
  const answer = answers[question];
  if (answer) process.send?.(answer());
  // Some of these ways keep connections for ever.
  else process.exit();
});
