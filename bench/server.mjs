/* One app under test in a process of its own; its name is the first argument. Tells its port, and on 'cpu' the CPU time that it has used. */
import { once } from 'node:events';
import express from 'express';
import { sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import createKnex from 'knex';

const [name = ''] = process.argv.slice(2);
const knex = createKnex({ client: 'pg', connection: process.env['BENCH_DATABASE_URL'] ?? '', pool: { min: 0, max: 10 } });

/** @type {Record<string, (app: import('express').Express) => void>} */
const apps = {
  session(app) {
    app.use(sessionMiddleware(knex));
    app.get('/select/:id', async (req, res) => {
      res.json(await req.session('accounts').where('id', req.params.id).first());
    });
    app.use(sessionErrorHandler());
  },

  'by hand'(app) {
    app.get('/select/:id', async (req, res) => {
      res.json(await knex.transaction((trx) => trx('accounts').where('id', req.params.id).first()));
    });
  },

  'no transaction'(app) {
    app.get('/select/:id', async (req, res) => {
      res.json(await knex('accounts').where('id', req.params.id).first());
    });
  },
};

const app = express();
apps[name]?.(app);
const server = app.listen(0, '127.0.0.1');
const listening = once(server, 'listening');

process.on('message', async (question) => {
  await listening;
  if (question === 'port') process.send?.(server.address());
  else if (question === 'cpu') process.send?.(process.cpuUsage());
  else {
    server.close();
    await knex.destroy();
    process.disconnect();
  }
});
