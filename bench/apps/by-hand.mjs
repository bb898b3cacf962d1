/* What the package replaces: knex.transaction() in each handler, and the response after it. */
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
    res.json(await knex.transaction((trx) => trx('accounts').where('id', req.params.id).first()));
  });

  app.post('/insert/:id', async (req, res) => {
    const account = await knex.transaction(async (trx) => {
      const found = await trx('accounts').where('id', req.params.id).first();
      await trx('entries').insert({ account: found.id, amount: 10 });
      return found;
    });
    res.status(201).json(account);
  });

  app.get('/ten/:id', async (req, res) => {
    const accounts = await knex.transaction(async (trx) => {
      const found = [];
      for (const id of tenFrom(req.params.id)) found.push(await trx('accounts').where('id', id).first());
      return found;
    });
    res.json(accounts);
  });

  app.get('/all/:id', async (req, res) => {
    const accounts = await knex.transaction((trx) =>
      Promise.all(tenFrom(req.params.id).map((id) => trx('accounts').where('id', id).first())),
    );
    res.json(accounts);
  });

  app.get('/stream', async (_req, res) => {
    await knex.transaction(async (trx) => {
      await pipeline(trx('accounts').orderBy('id').stream(), toLines, res.type('application/x-ndjson'));
    });
  });

  return listen(app, () => knex.destroy());
}
