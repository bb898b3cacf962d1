import { parseArgs } from 'node:util';
import createKnex from 'knex';
import { writeResults } from './result-file';
import { createScaleTables } from './scale-app';
import { measureWorkers } from './scale-cluster';
import { measureConnections } from './scale-connections';
import { measureHeap } from './scale-heap';
import { measureMemory } from './scale-memory';
import { measurePoolSizes } from './scale-pool-size';

interface Measured {
  report: string;
  figures?: object;
}

const parts: Record<string, (url: string, requests: number, profileFolder?: string) => Promise<Measured>> = {
  connections: (_url, _requests, profileFolder) => measureConnections(profileFolder),
  memory: () => measureMemory(),
  heap: (_url, requests) => measureHeap(requests),
  workers: behindPgBouncer(measureWorkers),
  'pool-sizes': behindPgBouncer(measurePoolSizes),
};

/** What becomes of the cost of a request when there are many, for long, and in several processes. */
export async function measureScale(url: string, args: string[], profileFolder?: string): Promise<void> {
  const { requests, only } = optionsOf(args);
  const knex = createKnex({ client: 'pg', connection: url });
  try {
    await createScaleTables(knex);
    const figures: Record<string, unknown> = {};
    for (const [name, measure] of Object.entries(parts)) {
      if (only && !only.includes(name)) continue;
      process.env['BENCH_DATABASE_URL'] = url;
      const measured = await measure(url, requests, profileFolder);
      figures[name] = measured.figures;
      console.log(`${measured.report}\n`);
    }
    if (!only) await writeResults('results-scale.json', url, figures);
  } finally {
    await knex.schema.dropTable('accounts');
    await knex.destroy();
  }
}

function optionsOf(args: string[]): { requests: number; only: string[] | undefined } {
  const options = { requests: { type: 'string', default: '100000' }, only: { type: 'string' } } as const;
  const { values } = parseArgs({ args, options });
  const only = values.only?.split(',');
  for (const name of only ?? []) {
    if (!parts[name]) throw new TypeError(`Expected --only to name some of ${Object.keys(parts).join(', ')}; got ${name}.`);
  }
  if (!/^[1-9]\d*$/.test(values.requests)) throw new TypeError(`Expected --requests to be a whole number from 1, got ${values.requests}.`);
  return { requests: Number(values.requests), only };
}

function behindPgBouncer(measure: (url: string) => Promise<Measured>): (url: string) => Promise<Measured> {
  return async (url) => {
    const { findPgBouncer } = await import('../tools/pgbouncer.mjs');
    return findPgBouncer() ? measure(url) : { report: 'Left out: PgBouncer is not installed here.' };
  };
}
