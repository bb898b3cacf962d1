/*
 * npm run bench: what a session costs, in one run.
 *
 * DATABASE_URL: use this server (a table `accounts` is made and dropped in it); else one is started.
 * BENCH_ROUNDS: how many rounds (9). BENCH_PROFILE: a folder for CPU profiles of the processes that are measured.
 */
import { measureNeverUsed } from './never-used';
import { measureOneSelect } from './one-select';

async function main(): Promise<void> {
  const profileFolder = process.env['BENCH_PROFILE'];
  const rounds = Number(process.env['BENCH_ROUNDS'] || 9);
  console.log(await measureNeverUsed({ rounds: rounds * 3, profileFolder }));

  const { startPostgres } = await import('../tools/postgres.mjs');
  const postgres = process.env['DATABASE_URL'] ? undefined : await startPostgres();
  try {
    console.log(await measureOneSelect(postgres?.url ?? (process.env['DATABASE_URL'] as string), { rounds, profileFolder }));
  } finally {
    await postgres?.stop();
  }
}

main().catch((error: unknown) => {
  console.error(error);
  process.exitCode = 1;
});
