/*
 * The app in several processes that share a port (node:cluster), or in one: the number of workers is the first argument, 0 for one process
 * without a cluster; the size of the pool of each the second; the milliseconds that a transaction of the route /work stays open the third.
 */
import cluster from 'node:cluster';
import { once } from 'node:events';
import express from 'express';
import { sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import createKnex from 'knex';

const [workers = '0', poolSize = '10', workMs = '25'] = process.argv.slice(2);

if (cluster.isPrimary && Number(workers) > 0) await lead();
else await serve();

async function lead() {
  const all = Array.from({ length: Number(workers) }, () => cluster.fork());
  const addresses = await Promise.all(all.map((worker) => once(worker, 'listening')));
  process.on('message', async (/** @type {string} */ question) => {
    if (question === 'stop') process.exit();
    if (question === 'port') {
      process.send?.(addresses[0]?.[0]);
      return;
    }
    const answers = all.map((worker) => once(worker, 'message').then(([answer]) => answer));
    for (const worker of all) worker.send(question);
    const usages = [...(await Promise.all(answers)), process.cpuUsage()];
    const sum = (/** @type {'user' | 'system'} */ name) => usages.reduce((total, usage) => total + usage[name], 0);
    process.send?.({ user: sum('user'), system: sum('system') });
  });
}

async function serve() {
  const knex = createKnex({
    client: 'pg',
    connection: process.env['BENCH_DATABASE_URL'] ?? '',
    pool: { min: 0, max: Number(poolSize) },
    log: { warn() {}, error() {} },
  });
  const app = express();
  app.disable('etag');
  app.set('env', 'test');
  app.use(sessionMiddleware(knex, { onError() {} }));
  app.get('/select/:id', async (req, res) => {
    res.json(await req.session('accounts').where('id', req.params.id).first());
  });
  app.get('/work/:id', async (req, res) => {
    await req.session.raw('SELECT pg_sleep(?)', [Number(workMs) / 1_000]);
    res.json(await req.session('accounts').where('id', req.params.id).first());
  });
  app.use(sessionErrorHandler());
  const server = app.listen({ port: 0, host: '127.0.0.1', backlog: 4_096 });
  server.keepAliveTimeout = 600_000;
  await once(server, 'listening');

  process.on('disconnect', () => process.exit());
  process.on('message', (/** @type {string} */ question) => {
    if (question === 'port') process.send?.(server.address());
    else if (question === 'cpu') process.send?.(process.cpuUsage());
    else if (question === 'stop') process.exit();
  });
}
