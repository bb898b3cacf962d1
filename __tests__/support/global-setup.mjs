import { startPostgres } from '../../tools/postgres.mjs';

/** One server for the whole run; every test file makes its own database on it: see database.ts. */
export default async function globalSetup() {
  let url = process.env['DATABASE_URL'];
  if (!url) {
    const server = await startPostgres({
      // The data does not outlive the run: no need to wait for the disk.
      settings: { max_connections: 300, fsync: 'off', synchronous_commit: 'off', full_page_writes: 'off' },
    });
    Object.assign(globalThis, { testPostgres: server });
    url = server.url;
  }
  process.env['TEST_DATABASE_URL'] = url;
}
