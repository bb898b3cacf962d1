import type { Knex } from 'knex';
import * as ledger from './001-ledger';
import * as rules from './002-rules';
import * as requestIds from './003-request-ids';

const migrations: Record<string, Knex.Migration> = { '001-ledger': ledger, '002-rules': rules, '003-request-ids': requestIds };

/**
 * Imports, not a folder that Knex lists: the names that the database remembers have no extension, so a compiled
 * app finds the migrations that it ran from TypeScript.
 */
export const migrationSource: Knex.MigrationSource<[name: string, migration: Knex.Migration]> = {
  getMigrations: async () => Object.entries(migrations),
  getMigrationName: ([name]) => name,
  getMigration: async ([, migration]) => migration,
};

export async function migrate(knex: Knex): Promise<void> {
  await knex.migrate.latest({ migrationSource });
}
