/** @typedef {import('../../tools/postgres.mjs').Postgres} Postgres */

export default async function globalTeardown() {
  await /** @type {{ testPostgres?: Postgres }} */ (globalThis).testPostgres?.stop();
}
