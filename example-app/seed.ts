import { withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { Journal } from './journal';

export const WORLD = '00000000-0000-4000-8000-000000000001';
export const ALICE = '00000000-0000-4000-8000-00000000000a';
export const BOB = '00000000-0000-4000-8000-00000000000b';

/** Fills an empty ledger with something to try, all or nothing; leaves any other as it is. */
export async function seedIfEmpty(knex: Knex): Promise<void> {
  await withSession(knex, async (session) => {
    if (await session('accounts').first()) return;

    await session('accounts').insert([
      { id: WORLD, name: 'World', kind: 'external' },
      { id: ALICE, name: 'Alice', kind: 'customer' },
      { id: BOB, name: 'Bob', kind: 'customer' },
    ]);
    const journal = new Journal(session);
    await journal.post({ id: '00000000-0000-4000-8000-000000000101', from: WORLD, to: ALICE, amount: 100_000n, memo: 'Salary' });
    await journal.post({ id: '00000000-0000-4000-8000-000000000102', from: WORLD, to: BOB, amount: 2_500n, memo: 'Sold a bicycle' });
    await journal.post({ id: '00000000-0000-4000-8000-000000000103', from: ALICE, to: BOB, amount: 1_250n, memo: 'Lunch' });
  });
}
