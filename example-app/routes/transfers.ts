import { Router } from 'express';
import { retryable } from 'express-knex-session';
import { z } from 'zod';
import type { Journal, NewTransfer, Transfer } from '../journal';
import { Problem } from '../problem';
import { bodyOf, cents, id, idOf, text } from '../validation';

const Wanted = z
  .strictObject({ id, from: id, to: id, amount: cents, memo: text.default('') })
  .refine(({ from, to }) => from !== to, { path: ['to'], message: 'Must be another account than `from`' });

/** @param notify told of each transfer that is stored, once */
export function transfers(journal: Journal, notify: (transfer: Transfer) => unknown): Router {
  const transfers = Router();

  /**
   * Moves money. If COMMIT refuses it, this handler's 201 never leaves, nobody is notified, and the client gets the problem instead. If it
   * was in a deadlock, which SQL from elsewhere may cause, it is tried again.
   *
   * The client chooses the id, so it may send the request again when it got no answer: the second time stores nothing.
   */
  transfers.post(
    '/',
    retryable(async (req, res) => {
      const wanted = bodyOf(req, Wanted);
      const posted = await journal.post(wanted);
      if (posted) {
        req.session.afterCommit(() => notify(posted));
        res.status(201).location(`/transfers/${posted.id}`).json(posted);
        return;
      }

      const stored = await journal.find(wanted.id);
      if (!stored || !isSame(stored, wanted)) throw new Problem(409, 'id-taken', 'The id belongs to another transfer');
      res.location(`/transfers/${stored.id}`).json(stored);
    }),
  );

  transfers.get('/:id', async (req, res) => {
    const transfer = await journal.find(idOf(req));
    if (!transfer) throw Problem.ofStatus(404);
    res.json(transfer);
  });

  return transfers;
}

const isSame = (stored: NewTransfer, wanted: NewTransfer): boolean =>
  (['from', 'to', 'amount', 'memo'] as const).every((key) => stored[key] === wanted[key]);
