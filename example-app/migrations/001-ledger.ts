import type { Knex } from 'knex';

export async function up(knex: Knex): Promise<void> {
  await knex.schema.createTable('accounts', (table) => {
    table.uuid('id').primary().defaultTo(knex.fn.uuid());
    table.text('name').notNullable();
    table.text('kind').notNullable().checkIn(['customer', 'external'], 'accounts_kind');
    table.bigInteger('balance').notNullable().defaultTo(0).comment('cents; kept by the trigger post_entry');
    table.timestamp('created_at').notNullable().defaultTo(knex.fn.now());
  });

  await knex.schema.createTable('transfers', (table) => {
    table.uuid('id').primary().comment('chosen by the client, so that a repeated request is not a second transfer');
    table.text('memo').notNullable();
    table.timestamp('created_at').notNullable().defaultTo(knex.fn.now());
  });

  await knex.schema.createTable('entries', (table) => {
    table.specificType('id', 'bigint generated always as identity primary key');
    table.uuid('transfer_id').notNullable().references('transfers.id').withKeyName('entries_transfer_exists');
    table.uuid('account_id').notNullable().references('accounts.id').withKeyName('entries_account_exists');
    table.bigInteger('amount').notNullable().comment('cents: above zero comes in, below zero goes out');
    table.check('amount <> 0', {}, 'entries_amount');
    table.unique(['transfer_id', 'account_id']);
    table.index(['account_id', 'id']);
  });
}

export async function down(knex: Knex): Promise<void> {
  await knex.schema.dropTable('entries').dropTable('transfers').dropTable('accounts');
}
