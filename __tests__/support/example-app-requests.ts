import { randomUUID } from 'node:crypto';
import type { Server } from 'node:http';
import type { Express } from 'express';
import type { Knex } from 'knex';
import request from 'supertest';

export interface Transfer {
  id?: string;
  from: string;
  to: string;
  amount: number | string;
  memo?: string;
}

export function transfer(app: Express | Server, body: Transfer): request.Test {
  return request(app)
    .post('/transfers')
    .send({ id: randomUUID(), ...body });
}

/** Money comes from it: it may be overdrawn. */
export function externalAccount(app: Express | Server): Promise<string> {
  return createAccount(app, 'external');
}

export async function twoAccounts(app: Express | Server, { balance = 0 } = {}): Promise<{ from: string; to: string }> {
  const from = await createAccount(app, 'customer');
  const to = await createAccount(app, 'customer');
  if (balance > 0) await transfer(app, { from: await externalAccount(app), to: from, amount: balance }).expect(201);
  return { from, to };
}

async function createAccount(app: Express | Server, kind: 'customer' | 'external'): Promise<string> {
  const { body } = await request(app).post('/accounts').send({ name: 'Test', kind }).expect(201);
  return body.id;
}

/** supertest sends a request only when it is awaited. */
export const send = (test: request.Test): Promise<request.Response> => test.then((response) => response);

export async function balanceOf(knex: Knex, id: string): Promise<string> {
  const account = await knex('accounts').where({ id }).first();
  return String(account?.balance);
}

/** Many entries of 1, 2, 3 ... cents; without the triggers, which would take minutes. */
export async function addEntries(knex: Knex, accountId: string, count: number, memo = ''): Promise<void> {
  await knex.transaction(async (trx) => {
    await trx.raw('set local session_replication_role = replica');
    await trx.raw(
      `with new as (select gen_random_uuid() as id, n from generate_series(1, :count::int) n),
        _ as (insert into transfers (id, memo) select id, :memo from new)
      insert into entries (transfer_id, account_id, amount) select id, :accountId, n from new order by n`,
      { accountId, count, memo },
    );
  });
}
