/*
 * npm run bench: what a session costs, against what else one could use; writes results.json and the charts.
 * npm run bench -- compare --routes=select,insert --only=session,by-hand: a part of it, only printed. Names: contestants.ts.
 * npm run bench -- charts: draws the charts again, from results.json, and prints the README's tables.
 * npm run bench -- reads: how long one SELECT takes, 5 ms from the database, in each mode.
 * npm run bench -- pool: who holds a connection, for how long, and what the others pay for it; writes results-pool.json.
 * npm run bench -- scale --requests=1000000: many clients, many requests (100,000), memory, several processes; writes results-scale.json.
 *   --only=connections,memory,heap,workers,pool-sizes: a part of it, only printed.
 * npm run bench -- testing: how long a test of an app takes, with testDatabase() and in other ways.
 *
 * DATABASE_URL: use this server (a table `accounts`, or databases, are made and dropped in it); else one is started.
 * BENCH_ROUNDS: how many rounds (8). BENCH_PROFILE: a folder for CPU profiles of the processes that are measured.
 */
import { measureCheapReads } from './cheap-reads';
import { compare, partsOf, redraw } from './compare';
import { measureNeverUsed } from './never-used';
import { installPeers } from './peers';
import { measurePoolEconomy } from './pool-economy';
import { measureScale } from './scale';
import { measureTesting } from './testing';

const profileFolder = process.env['BENCH_PROFILE'];
const rounds = Number(process.env['BENCH_ROUNDS'] || 8);

const commands: Record<string, (args: string[]) => Promise<void> | void> = {
  async all() {
    // Before all that is started from here: the package under test is one of them.
    installPeers();
    console.log(`${await measureNeverUsed({ rounds: rounds * 3, profileFolder })}\n`);
    await compareParts([]);
  },
  async compare(args) {
    installPeers();
    await compareParts(args);
  },
  charts() {
    installPeers();
    console.log(redraw());
  },
  reads: () => onServer({}, async (url) => console.log(await measureCheapReads(url, { rounds }))),
  async pool() {
    installPeers();
    await onServer({}, async (url) => console.log(await measurePoolEconomy(url)));
  },
  async scale(args) {
    installPeers();
    await onServer({ max_connections: '250' }, (url) => measureScale(url, args, profileFolder));
  },
  testing: compareTesting,
};

async function main([name = 'all', ...args]: string[]): Promise<void> {
  const command = commands[name];
  if (!command) throw new TypeError(`Expected one of ${Object.keys(commands).join(', ')}; got ${name}.`);
  await command(args);
}

/** Each process of each contestant keeps a pool of its own. */
async function compareParts(args: string[]): Promise<void> {
  const parts = partsOf(args);
  await onServer({ max_connections: '400' }, (url) => compare(url, { rounds, profileFolder, ...parts }));
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

main(process.argv.slice(2)).catch((error: unknown) => {
  console.error(error);
  process.exitCode = 1;
});
