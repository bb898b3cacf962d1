import { Router } from 'express';
import { sessionOptions } from 'express-knex-session';
import type { Knex } from 'knex';
import { z } from 'zod';
import { Problem } from '../problem';
import type { AccountRow } from '../tables';
import { bodyOf, idOf, text } from '../validation';

export const accounts = Router();

const NewAccount = z.strictObject({
  name: text.min(1),
  kind: z.enum(['customer', 'external']).default('customer'),
});

accounts.post('/', async (req, res) => {
  const [account] = await req.session('accounts').insert(bodyOf(req, NewAccount)).returning('*');
  if (!account) throw new Error('INSERT returned no row');
  res.status(201).location(`/accounts/${account.id}`).json(toJson(account));
});

/** An account, its balance and its latest 100 entries. The statement has all of them. */
// One snapshot for both queries, or a transfer between them makes entries and balance disagree.
accounts.get('/:id', sessionOptions({ isolationLevel: 'repeatable read' }), async (req, res) => {
  const account = await findAccount(req.session, idOf(req));
  const entries = await req
    .session('entries')
    .join('transfers', 'transfers.id', 'entries.transfer_id')
    .where('entries.account_id', account.id)
    .orderBy('entries.id', 'desc')
    .limit(100)
    .select('transfers.id as transfer', 'transfers.memo', 'entries.amount', 'transfers.created_at as createdAt');
  res.json({ ...toJson(account), entries });
});

export async function findAccount(session: Knex, id: string): Promise<AccountRow> {
  const account = await session('accounts').where({ id }).first();
  if (!account) throw Problem.ofStatus(404);
  return account;
}

const toJson = ({ id, name, kind, balance, created_at: createdAt }: AccountRow) => ({ id, name, kind, balance, createdAt });
