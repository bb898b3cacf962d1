import { once } from 'node:events';
import { pipeline } from 'node:stream/promises';
import { stringify } from 'csv-stringify';
import { Router } from 'express';
import { idOf } from '../validation';
import { findAccount } from './accounts';

export const statement = Router();

/**
 * All entries of an account, oldest first, as CSV. The rows come from the session one by one, as fast as the client
 * reads: the transaction stays open meanwhile.
 */
statement.get('/:id/statement.csv', async (req, res) => {
  const account = await findAccount(req.session, idOf(req));
  const rows = req
    .session('entries')
    .join('transfers', 'transfers.id', 'entries.transfer_id')
    .where('entries.account_id', account.id)
    .orderBy('entries.id')
    .select('transfers.created_at as date', 'transfers.id as transfer', 'transfers.memo', 'entries.amount')
    .stream();
  const csv = stringify({
    header: true,
    columns: ['date', 'transfer', 'memo', 'amount'],
    cast: { date: (date) => date.toISOString() },
    escape_formulas: true, // A memo is someone else's text, and a spreadsheet would run it.
  });
  const send = async () => {
    await once(csv, 'readable'); // A query that fails does so here, where its error can still become a problem.
    res.attachment('statement.csv');
    await pipeline(csv, res); // An error on the way cuts the connection: half a statement never looks whole.
  };
  await Promise.all([pipeline(rows, csv), send()]);
});
