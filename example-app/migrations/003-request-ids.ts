import type { Knex } from 'knex';

/**
 * Which request has stored a transfer. No route writes it: the app sets `app.request_id` for each of its transactions (see app.ts), and
 * whatever stores a transfer in one has it written down. Without one, as in a script, there is none.
 */
export async function up(knex: Knex): Promise<void> {
  // A setting that another transaction on the same connection has had reads '', and not null.
  const requestId = knex.raw("nullif(current_setting('app.request_id', true), '')::uuid");
  await knex.schema.alterTable('transfers', (table) => table.uuid('request_id').defaultTo(requestId));
}

export async function down(knex: Knex): Promise<void> {
  await knex.schema.alterTable('transfers', (table) => table.dropColumn('request_id'));
}
