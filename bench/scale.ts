import createKnex from 'knex';
import { writeResults } from './result-file';
import { createScaleTables } from './scale-app';
import { measureWorkers } from './scale-cluster';
import { measureConnections } from './scale-connections';
import { measureHeap } from './scale-heap';
import { measureMemory } from './scale-memory';
import { measurePoolSizes } from './scale-pool-size';

/** What becomes of the cost of a request when there are many, for long, and in several processes. */
export async function measureScale(
  url: string,
  { requests, profileFolder }: { requests: number; profileFolder?: string | undefined },
): Promise<string> {
  const knex = createKnex({ client: 'pg', connection: url });
  process.env['BENCH_DATABASE_URL'] = url;
  try {
    await createScaleTables(knex);
    const connections = await measureConnections(profileFolder);
    const memory = await measureMemory();
    const heap = await measureHeap(requests);
    const several = await measureSeveral(url);
    await writeResults('results-scale.json', url, {
      connections: connections.figures,
      memory: memory.figures,
      heap: heap.figures,
      workers: several.workers,
      poolSizes: several.poolSizes,
    });
    return [connections.report, memory.report, heap.report, several.report].join('\n\n');
  } finally {
    await knex.schema.dropTable('accounts');
    await knex.destroy();
  }
}

async function measureSeveral(url: string) {
  const { findPgBouncer } = await import('../tools/pgbouncer.mjs');
  if (!findPgBouncer()) return { report: 'Left out: several processes behind PgBouncer, which is not installed here.' };
  const workers = await measureWorkers(url);
  const poolSizes = await measurePoolSizes(url);
  process.env['BENCH_DATABASE_URL'] = url;
  return { workers: workers.figures, poolSizes: poolSizes.figures, report: `${workers.report}\n\n${poolSizes.report}` };
}
