import type { Knex } from 'knex';
import { Child } from './child';

/** One way of pool-economy-server.mjs, in its process. */
export class PoolApp {
  private constructor(
    private readonly child: Child,
    readonly port: number,
  ) {}

  static async start(name: string, { poolSize, slowSocket = '' }: { poolSize: number; slowSocket?: string }): Promise<PoolApp> {
    const child = new Child('pool-economy-server.mjs', [name, String(poolSize), slowSocket], { execArgv: ['--no-deprecation'] });
    const { port } = await child.ask<{ port: number }>('port');
    return new PoolApp(child, port);
  }

  /** Connections in use, and requests that wait for one. */
  pool(): Promise<{ used: number; waiting: number }> {
    return this.child.ask('pool');
  }

  /** How long each taking of a connection has waited, in ms, and the errors that nobody had asked for, since the last time. */
  figures(): Promise<{ waits: number[]; errors: Record<string, number> }> {
    return this.child.ask('figures');
  }

  stop(): Promise<void> {
    return this.child.stop();
  }
}

export async function createPoolTables(knex: Knex): Promise<void> {
  await dropPoolTables(knex);
  await knex.schema.createTable('accounts', (table) => {
    table.integer('id').primary();
    table.text('name');
    table.integer('balance');
  });
  await knex.schema.createTable('entries', (table) => {
    table.integer('transfer').index();
    table.integer('account');
    table.integer('amount');
  });
  await knex.raw("INSERT INTO accounts SELECT id, 'account ' || id, id * 10 FROM generate_series(1, 1000) AS id");
  await knex.raw('ANALYZE accounts');
}

export async function dropPoolTables(knex: Knex): Promise<void> {
  for (const name of ['accounts', 'entries']) await knex.schema.dropTableIfExists(name);
}
