/* A middleware as people write it first: begins at once, commits when the response has been sent. */
import { pipeline } from 'node:stream/promises';
import express from 'express';
import createKnex from 'knex';
import { knexPool, tenFrom, toLines } from './data.mjs';
import { listen } from './listen.mjs';

/** @param {{ url: string }} settings */
export function start({ url }) {
  const knex = createKnex({ client: 'pg', connection: url, pool: knexPool });
  const app = express();
  app.use(async (req, res, next) => {
    const trx = await knex.transaction();
    Object.assign(req, { trx });
    res.once('finish', () => {
      const end = res.statusCode < 400 ? trx.commit() : trx.rollback();
      end.catch(console.error);
    });
    next();
  });
  /** @param {import('express').Request} req */
  const trxOf = (req) => /** @type {{ trx: import('knex').Knex.Transaction }} */ (/** @type {unknown} */ (req)).trx;

  app.get('/untouched', (_req, res) => {
    res.json({ ok: true });
  });

  app.get('/select/:id', async (req, res) => {
    res.json(await trxOf(req)('accounts').where('id', req.params.id).first());
  });

  app.post('/insert/:id', async (req, res) => {
    const account = await trxOf(req)('accounts').where('id', req.params.id).first();
    await trxOf(req)('entries').insert({ account: account.id, amount: 10 });
    res.status(201).json(account);
  });

  app.get('/ten/:id', async (req, res) => {
    const accounts = [];
    for (const id of tenFrom(req.params.id)) accounts.push(await trxOf(req)('accounts').where('id', id).first());
    res.json(accounts);
  });

  app.get('/all/:id', async (req, res) => {
    res.json(await Promise.all(tenFrom(req.params.id).map((id) => trxOf(req)('accounts').where('id', id).first())));
  });

  app.get('/stream', async (req, res) => {
    await pipeline(trxOf(req)('accounts').orderBy('id').stream(), toLines, res.type('application/x-ndjson'));
  });

  return listen(app, () => knex.destroy());
}
