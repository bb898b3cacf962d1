import type { Knex } from 'knex';

export interface AccountRow {
  id: string;
  name: string;
  kind: 'customer' | 'external';
  balance: bigint;
  created_at: Date;
}

export interface TransferRow {
  id: string;
  memo: string;
  created_at: Date;
  request_id: string | null;
}

export interface EntryRow {
  id: bigint;
  transfer_id: string;
  account_id: string;
  amount: bigint;
}

/** A table as Knex sees it: what a row has, and what an insert must give. */
type Table<Row, Required extends keyof Row> = Knex.CompositeTableType<Row, Pick<Row, Required> & Partial<Row>>;

declare module 'knex/types/tables' {
  interface Tables {
    accounts: Table<AccountRow, 'name' | 'kind'>;
    transfers: Table<TransferRow, 'id' | 'memo'>;
    entries: Table<EntryRow, 'transfer_id' | 'account_id' | 'amount'>;
  }
}
