import { withSession } from 'express-knex-session';
import type { Knex } from 'knex';

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
    await transfer(session, '00000000-0000-4000-8000-000000000101', WORLD, ALICE, 100_000n, 'Salary');
    await transfer(session, '00000000-0000-4000-8000-000000000102', WORLD, BOB, 2_500n, 'Sold a bicycle');
    await transfer(session, '00000000-0000-4000-8000-000000000103', ALICE, BOB, 1_250n, 'Lunch');
  });
}

async function transfer(session: Knex, id: string, from: string, to: string, amount: bigint, memo: string): Promise<void> {
  await session('transfers').insert({ id, memo });
  await session('entries').insert([
    { transfer_id: id, account_id: from, amount: -amount },
    { transfer_id: id, account_id: to, amount },
  ]);
}
