import type { Knex } from 'knex';

export interface NewTransfer {
  /** Chosen by the client. */
  id: string;
  from: string;
  to: string;
  /** Cents. */
  amount: bigint;
  memo: string;
}

export type Transfer = NewTransfer & { createdAt: Date };

/**
 * Where transfers are kept. It is handed no request: in the app, `db` is the session of whichever request runs (`scopedSession`), and in
 * seed.ts it is that of `withSession`.
 */
export class Journal {
  constructor(private readonly db: Knex) {}

  /**
   * Stores a transfer, unless there is one with its id. Whether it may be made is seen at COMMIT, by the rules in migrations/002-rules.ts.
   *
   * Waits for a request under way with the same id, and sees what became of it.
   */
  async post({ id, from, to, amount, memo }: NewTransfer): Promise<Transfer | undefined> {
    const [inserted] = await this.db('transfers').insert({ id, memo }).onConflict('id').ignore().returning('created_at');
    if (!inserted) return undefined;
    await this.db('entries').insert([
      { transfer_id: id, account_id: from, amount: -amount },
      { transfer_id: id, account_id: to, amount },
    ]);
    return { id, from, to, amount, memo, createdAt: inserted.created_at };
  }

  async find(id: string): Promise<Transfer | undefined> {
    const { db } = this;
    return db('transfers')
      .join('entries as debit', (join) => join.on('debit.transfer_id', 'transfers.id').andOn('debit.amount', '<', db.raw('0')))
      .join('entries as credit', (join) => join.on('credit.transfer_id', 'transfers.id').andOn('credit.amount', '>', db.raw('0')))
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
}
