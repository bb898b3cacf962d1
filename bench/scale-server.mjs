/*
 * For the tables of scale: one app in a process of its own. Its name is the first argument, the size of its pool the second.
 * Tells its port, its CPU time and, with --expose-gc, its heap after garbage collection.
 */
import { once } from 'node:events';
import { setImmediate as turn } from 'node:timers/promises';
import express from 'express';
import { sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import createKnex from 'knex';

const [name = '', poolSize = '10'] = process.argv.slice(2);
const knex = createKnex({
  client: 'pg',
  connection: process.env['BENCH_DATABASE_URL'] ?? '',
  pool: { min: 0, max: Number(poolSize) },
  log: { warn() {}, error() {} },
});

/** @param {import('express').Express} app @param {(req: import('express').Request) => import('knex').Knex} dbOf */
function select(app, dbOf) {
  app.get('/select/:id', async (req, res) => {
    res.json(await dbOf(req)('accounts').where('id', req.params.id).first());
  });
}

/** @type {Record<string, (app: import('express').Express) => void>} */
const apps = {
  'no transaction'(app) {
    app.use((_req, _res, next) => next());
    select(app, () => knex);
  },

  'by hand'(app) {
    app.use((_req, _res, next) => next());
    app.get('/select/:id', async (req, res) => {
      res.json(await knex.transaction((trx) => trx('accounts').where('id', req.params.id).first()));
    });
  },

  session(app) {
    // Thousands may wait for ten connections: as long as Knex by itself.
    app.use(sessionMiddleware(knex, { acquireTimeout: 60_000 }));
    select(app, (req) => req.session);
    app.get('/update/:id', async (req, res) => {
      await req.session('accounts').where('id', req.params.id).increment('balance');
      res.sendStatus(200);
    });
    app.get('/nothing/:id', (_req, res) => res.sendStatus(200));
    app.get('/missing/:id', async (req, res) => {
      await req.session('accounts').where('id', -req.params.id).first();
      res.sendStatus(404);
    });
    app.get('/refused/:id', async (req) => {
      await req.session('accounts').where('id', req.params.id).increment('balance');
      throw Object.assign(new Error('Refused.'), { status: 422 });
    });
    app.use(sessionErrorHandler());
  },
};

const app = express();
app.disable('etag');
// Express prints errors otherwise.
app.set('env', 'test');
apps[name]?.(app);
const server = app.listen({ port: 0, host: '127.0.0.1', backlog: 4_096 });
server.keepAliveTimeout = 600_000;
await once(server, 'listening');

/** @type {Record<string, () => unknown>} */
const answers = {
  port: () => server.address(),
  cpu: () => process.cpuUsage(),
  waiting: () => knex.client.pool.numPendingAcquires(),
  async heap() {
    for (let round = 0; round < 3; round++) {
      globalThis.gc?.();
      await turn();
    }
    return process.memoryUsage().heapUsed;
  },
};
process.on('message', async (/** @type {string} */ question) => {
  const answer = answers[question];
  if (answer) process.send?.(await answer());
  // Not process.exit(), which leaves no profile.
  else {
    server.close();
    server.closeAllConnections();
    await knex.destroy();
    process.disconnect();
  }
});
