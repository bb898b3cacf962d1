import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { findPgBouncer } from '../../tools/pgbouncer.mjs';
import { startPostgres } from '../../tools/postgres.mjs';

/**
 * One server for the whole run; every test file makes its own database on it: see database.ts.
 *
 * @param {unknown} _
 * @param {import('@jest/types').Config.ProjectConfig} project
 */
export default async function globalSetup(_, { testEnvironmentOptions }) {
  const isPooled = testEnvironmentOptions['pgbouncer'] === true;
  const program = findPgBouncer();
  if (program !== undefined) process.env['TEST_PGBOUNCER_PROGRAM'] = program;
  else if (isPooled) {
    // environment.js skips every test.
    console.warn('\nSkipped: PgBouncer is not installed (Debian and Ubuntu: apt-get install pgbouncer). No test was run behind it.');
    return;
  }

  let url = process.env['DATABASE_URL'];
  if (!url) {
    const server = await startPostgres({
      // The data does not outlive the run: no need to wait for the disk, or to clean up.
      settings: { max_connections: 300, fsync: 'off', synchronous_commit: 'off', full_page_writes: 'off', autovacuum: 'off' },
    });
    Object.assign(globalThis, { testPostgres: server });
    url = server.url;
    process.env['TEST_SERVER_VERSION'] = (await readFile(join(server.dataDir, 'PG_VERSION'), 'utf8')).trim();
  }
  process.env['TEST_DATABASE_URL'] = url;
}
