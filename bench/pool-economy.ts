import createKnex from 'knex';
import { createPoolTables, dropPoolTables } from './pool-economy-app';
import { measureLateStatements } from './pool-economy-late';
import { measureSlowReaders } from './pool-economy-readers';
import { measureThreeWays } from './pool-economy-ways';
import { writeResults } from './result-file';

/** Who holds a connection of the pool, for how long, and what the others pay for it. */
export async function measurePoolEconomy(url: string): Promise<string> {
  const knex = createKnex({ client: 'pg', connection: url });
  process.env['BENCH_DATABASE_URL'] = url;
  try {
    await createPoolTables(knex);
    const late = await measureLateStatements();
    const readers = await measureSlowReaders();
    const ways = await measureThreeWays(knex);
    await writeResults('results-pool.json', url, {
      lateStatements: late.figures,
      slowReaders: readers.figures,
      threeWays: ways.figures,
    });
    return [late.report, readers.report, ways.report].join('\n\n');
  } finally {
    await dropPoolTables(knex);
    await knex.destroy();
  }
}
