import type { Knex } from 'knex';
import { Child } from './child';

/** A process of scale-server.mjs or scale-cluster.mjs. */
export class ScaleApp {
  private constructor(
    readonly child: Child,
    readonly port: number,
  ) {}

  static async start(file: string, args: string[], options: { execArgv?: string[]; profileFolder?: string | undefined } = {}) {
    const child = new Child(file, args, options);
    const { port } = await child.ask<{ port: number }>('port');
    return new ScaleApp(child, port);
  }

  /** Microseconds, so far. */
  async cpu(): Promise<number> {
    const { user, system } = await this.child.ask<NodeJS.CpuUsage>('cpu');
    return user + system;
  }

  heap(): Promise<number> {
    return this.child.ask('heap');
  }

  stop(): Promise<void> {
    return this.child.stop();
  }
}

export async function createScaleTables(knex: Knex): Promise<void> {
  await knex.schema.dropTableIfExists('accounts');
  await knex.schema.createTable('accounts', (table) => {
    table.integer('id').primary();
    table.text('name');
    table.integer('balance');
  });
  await knex.raw("INSERT INTO accounts SELECT id, 'account ' || id, id * 10 FROM generate_series(1, 1000) AS id");
  await knex.raw('ANALYZE accounts');
}
