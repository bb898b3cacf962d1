import { Router } from 'express';
import type { Knex } from 'knex';
import { z } from 'zod';
import { Problem } from '../problem';
import { bodyOf, cents, id, idOf, text } from '../validation';

export const transfers = Router();

const NewTransfer = z
  .strictObject({ id, from: id, to: id, amount: cents, memo: text.default('') })
  .refine(({ from, to }) => from !== to, { path: ['to'], message: 'Must be another account than `from`' });

type NewTransfer = z.infer<typeof NewTransfer>;
type Transfer = NewTransfer & { createdAt: Date };

/**
 * Moves money. Whether it may is seen at COMMIT, by the rules in migrations/002-rules.ts: if it fails, this handler's
 * 201 never leaves, and the client gets the problem instead.
 *
 * The client chooses the id, so it may send the request again when it got no answer: the second time stores nothing.
 */
transfers.post('/', async (req, res) => {
  const wanted = bodyOf(req, NewTransfer);
  const { id, from, to, amount, memo } = wanted;

  // Waits for a request under way with the same id, and sees what became of it.
  const [inserted] = await req.session('transfers').insert({ id, memo }).onConflict('id').ignore().returning('*');
  if (inserted) {
    await req.session('entries').insert({ transfer_id: id, account_id: from, amount: -amount });
    await req.session('entries').insert({ transfer_id: id, account_id: to, amount });
    res
      .status(201)
      .location(`/transfers/${id}`)
      .json({ ...wanted, createdAt: inserted.created_at });
    return;
  }

  const stored = await findTransfer(req.session, id);
  if (!stored || !isSame(stored, wanted)) throw new Problem(409, 'id-taken', 'The id belongs to another transfer');
  res.location(`/transfers/${id}`).json(stored);
});

transfers.get('/:id', async (req, res) => {
  const transfer = await findTransfer(req.session, idOf(req));
  if (!transfer) throw Problem.ofStatus(404);
  res.json(transfer);
});

async function findTransfer(session: Knex, id: string): Promise<Transfer | undefined> {
  return session('transfers')
    .join('entries as debit', (join) => join.on('debit.transfer_id', 'transfers.id').andOn('debit.amount', '<', session.raw('0')))
    .join('entries as credit', (join) => join.on('credit.transfer_id', 'transfers.id').andOn('credit.amount', '>', session.raw('0')))
    .where('transfers.id', id)
    .first(
      'transfers.id',
      'debit.account_id as from',
      'credit.account_id as to',
      'credit.amount',
      'transfers.memo',
      'transfers.created_at as createdAt',
    );
}

const isSame = (stored: NewTransfer, wanted: NewTransfer): boolean =>
  (['from', 'to', 'amount', 'memo'] as const).every((key) => stored[key] === wanted[key]);
