/*
 * npm run bench: what a session costs, against what else one could use; writes results.json and the charts.
 * npm run bench -- compare --routes=select,insert --only=session,by-hand: a part of it, only printed. Names: contestants.ts.
 * npm run bench -- reads: how long one SELECT takes, 5 ms from the database, in each mode.
 * npm run bench -- testing: how long a test of an app takes, with testDatabase() and in other ways.
 *
 * DATABASE_URL: use this server (a table `accounts`, or databases, are made and dropped in it); else one is started.
 * BENCH_ROUNDS: how many rounds (9). BENCH_PROFILE: a folder for CPU profiles of the processes that are measured.
 */
import { measureCheapReads } from './cheap-reads';
import { compare, partsOf } from './compare';
import { measureNeverUsed } from './never-used';
import { installPeers } from './peers';
import { measureTesting } from './testing';

const profileFolder = process.env['BENCH_PROFILE'];
const rounds = Number(process.env['BENCH_ROUNDS'] || 9);

async function main(): Promise<void> {
  if (process.argv[2] === 'testing') return compareTesting();
  if (process.argv[2] === 'reads') return onServer({}, async (url) => console.log(await measureCheapReads(url, { rounds })));
  // Before all that is started from here: the package under test is one of them.
  installPeers();
  const parts = partsOf(process.argv.slice(3));
  if (process.argv[2] === undefined) console.log(`${await measureNeverUsed({ rounds: rounds * 3, profileFolder })}\n`);
  await onServer({ max_connections: '250' }, async (url) => {
    await compare(url, { rounds, profileFolder, ...parts });
  });
}

async function compareTesting(): Promise<void> {
  const run = (title: string) => async (url: string) => console.log(await measureTesting(url, { rounds, title }));
  if (process.env['DATABASE_URL']) return onServer({}, run('DATABASE_URL'));
  await onServer({}, run('fsync=on'));
  await onServer({ fsync: 'off', synchronous_commit: 'off', full_page_writes: 'off' }, run('fsync=off'));
}

async function onServer(settings: Record<string, string>, measure: (url: string) => Promise<void>): Promise<void> {
  if (process.env['DATABASE_URL']) return measure(process.env['DATABASE_URL']);
  const { startPostgres } = await import('../tools/postgres.mjs');
  const postgres = await startPostgres({ settings });
  try {
    await measure(postgres.url);
  } finally {
    await postgres.stop();
  }
}

main().catch((error: unknown) => {
  console.error(error);
  process.exitCode = 1;
});
