/* The package under test. */
import { pipeline } from 'node:stream/promises';
import express from 'express';
import { sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import createKnex from 'knex';
import { knexPool, tenFrom, toLines } from './data.mjs';
import { listen } from './listen.mjs';

/** @param {{ url: string, options?: import('express-knex-session').SessionOptions, connection?: object }} settings */
export function start({ url, options, connection }) {
  const knex = createKnex({ client: 'pg', connection: { connectionString: url, ...connection }, pool: knexPool });
  const app = express();
  app.use(sessionMiddleware(knex, options));

  app.get('/untouched', (_req, res) => {
    res.json({ ok: true });
  });

  app.get('/select/:id', async (req, res) => {
    res.json(await req.session('accounts').where('id', req.params.id).first());
  });

  app.post('/insert/:id', async (req, res) => {
    const account = await req.session('accounts').where('id', req.params.id).first();
    await req.session('entries').insert({ account: account.id, amount: 10 });
    res.status(201).json(account);
  });

  app.get('/ten/:id', async (req, res) => {
    const accounts = [];
    for (const id of tenFrom(req.params.id)) accounts.push(await req.session('accounts').where('id', id).first());
    res.json(accounts);
  });

  app.get('/all/:id', async (req, res) => {
    res.json(await Promise.all(tenFrom(req.params.id).map((id) => req.session('accounts').where('id', id).first())));
  });

  app.get('/stream', async (req, res) => {
    await pipeline(req.session('accounts').orderBy('id').stream(), toLines, res.type('application/x-ndjson'));
  });

  app.use(sessionErrorHandler());
  return listen(app, () => knex.destroy());
}
