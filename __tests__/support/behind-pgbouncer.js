/*
 * What `npm run test:pgbouncer` leaves out: the core's tests run there with a PgBouncer in transaction mode between the
 * app's pools and the server. Everything that is not named here runs.
 */

/** Test files that are not about the core and a database, and why. */
const excludedFiles = {
  'abort-cancel': 'its proxy closes the connections of cancels half-way, of which PgBouncer 1.18 dies (its issue #801)',
  'abort-storm': 'needs cancels that are as fast as without PgBouncer; pgbouncer-cancel.test.ts has a storm of its own',
  'abort-ways-in': 'is about other ways to the server',
  'bench.*': 'measures a database that answers at once',
  'chaos.*': 'brings its own servers',
  'docs.*': 'is about the documents',
  'example-app.*': 'is about the example app',
  launcher: 'is about our own PostgreSQL',
  'matrix-restart': 'brings its own server',
  packaging: 'is about the npm package',
  'pgbouncer.*': 'brings its own PgBouncer',
  'readme.*': 'is about the README',
  'recipes.*': 'is about the documents',
  'soak.*': 'brings its own servers',
  support: "is about the tests' own tools",
  replica: 'brings its own servers',
  'testing.*': 'is about tests of apps, which hold one connection for all',
  types: 'has no database',
};

const REFUSED = 'PgBouncer refuses settings as startup parameters; pgbouncer.test.ts has them set on the database';
const LIVES_ON = "PgBouncer replaces an idle server connection that has died, and keeps the app's";
const OUTLIVES = "looks for the end of a server's process, which PgBouncer keeps when the app's connection is destroyed";

/**
 * Tests that cannot hold behind a transaction pooler: file, a part of the full name, and why.
 *
 * @type {[file: string, name: string, reason: string][]}
 */
const excludedTests = [
  ['connection-lost', 'when the server ends a transaction that takes too long', REFUSED],
  ['connection-lost', 'when the server ends a statement that takes too long', REFUSED],
  ['connection-lost', 'when an idle connection of the pool has died is not noticed', LIVES_ON],
  ['knex-pool', 'is not taken when it is known to be dead', LIVES_ON],
  ['matrix-connection', 'before BEGIN: 503, D (killed)', LIVES_ON],
  ['matrix-connection', 'after COMMIT, before the response: 200, D (killed)', LIVES_ON],
  ['matrix-connection', 'during the response: unaffected (killed)', LIVES_ON],
  ['matrix-sql-errors', 'fault: 40001, 40P01', REFUSED],
  ['matrix-sql-errors', 'fault: statement_timeout during a statement', REFUSED],
  ['matrix-sql-errors', 'fault: statement_timeout during COMMIT: RB, 500 (lock_timeout', REFUSED],
  ['matrix-sql-errors', 'fault: idle_in_transaction timeout', REFUSED],
  ['commit-fails-connection', 'when BEGIN fails does so too if the connection has died in the pool', LIVES_ON],
  [
    'abort-outer',
    'a late cancel does not hit',
    'its proxy closes the connections of cancels half-way, of which PgBouncer 1.18 dies (its issue #801)',
  ],
  ['no-transaction', 'passes a lost connection on as an error', 'outside of a transaction nobody knows which server connection is meant'],
  ['wire-atomic', 'when BEGIN fails and a statement that shares its Sync never runs', OUTLIVES],
  ['wire-atomic', 'when BEGIN fails and a statement that must wait for it never runs', OUTLIVES],
  [
    'knex-errors',
    'when a statement takes longer than its timeout gives the error of Knex and cancels it, with { cancel: true }: plainly',
    "Knex's own cancelling asks for the process id that the driver knows, which is PgBouncer's invention; that of a session works",
  ],
];

module.exports = { excludedFiles, excludedTests };
