/* Knex without a transaction. */
import { pipeline } from 'node:stream/promises';
import express from 'express';
import createKnex from 'knex';
import { knexPool, tenFrom, toLines } from './data.mjs';
import { listen } from './listen.mjs';

/** @param {{ url: string }} settings */
export function start({ url }) {
  const knex = createKnex({ client: 'pg', connection: url, pool: knexPool });
  const app = express();

  app.get('/select/:id', async (req, res) => {
    res.json(await knex('accounts').where('id', req.params.id).first());
  });

  app.post('/insert/:id', async (req, res) => {
    const account = await knex('accounts').where('id', req.params.id).first();
    await knex('entries').insert({ account: account.id, amount: 10 });
    res.status(201).json(account);
  });

  app.get('/ten/:id', async (req, res) => {
    const accounts = [];
    for (const id of tenFrom(req.params.id)) accounts.push(await knex('accounts').where('id', id).first());
    res.json(accounts);
  });

  app.get('/all/:id', async (req, res) => {
    res.json(await Promise.all(tenFrom(req.params.id).map((id) => knex('accounts').where('id', id).first())));
  });

  app.get('/stream', async (_req, res) => {
    await pipeline(knex('accounts').orderBy('id').stream(), toLines, res.type('application/x-ndjson'));
  });

  return listen(app, () => knex.destroy());
}
