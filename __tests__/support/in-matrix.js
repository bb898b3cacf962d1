/*
 * What `npm run matrix` runs on other versions of Express, Knex, pg, PostgreSQL and Node: of each promise the tests that touch what those
 * versions do. What it leaves out repeats these for long, is about tools, or brings servers and processes of its own.
 */

const coreFiles = {
  'what is installed': ['versions'],
  'the gate': [
    ...['complete-responses', 'connections', 'failure-handlers', 'failure-headers', 'failure-late-writes', 'finish'].map(
      (name) => `gate-${name}`,
    ),
    ...['heads', 'held', 'pipelined', 'statements', 'writes'].map((name) => `gate-${name}`),
  ],
  'how a request ends': ['outcome', 'outcome-by-hand', 'outcome-decision', 'outcome-routers', 'lifecycle', 'laziness', 'with-session'],
  'a COMMIT that fails': ['commit-fails', 'commit-fails-connection', 'commit-fails-error-handlers', 'commit-fails-late-errors'],
  leaks: ['connection-commit', 'connection-context', 'connection-lost', 'connection-pool', 'connection-rollback'],
  streams: ['knex-streams', 'outcome-streams', 'streaming-end', 'streaming-errors', 'streaming-session', 'streaming-tls'],
  'clients that leave': ['abort-cancel', 'abort-knex-timeout', 'abort-statement', 'disconnect', 'disconnect-connections', 'signal'],
  deadlines: ['deadlines-acquire', 'deadlines-hung', 'deadlines-responses', 'deadlines-settle', 'deadlines-streams'],
  'hooks and options': ['hooks', 'hooks-http', 'modes', 'options', 'session-options', 'session-set', 'settings', 'row-level-security'],
  "Knex's face": [
    ...['configuration', 'differences', 'errors', 'events', 'queries', 'raw-and-schema', 'transactions'].map((name) => `knex-${name}`),
    ...['bad-input', 'objection', 'outer-transaction', 'savepoints', 'scoped-session', 'context', 'context-driver'],
  ],
  'statements on the wire': [
    ...['bad-input-transaction-control', 'statements-control', 'statements-errors', 'statements-order', 'no-transaction', 'checkpoint'],
    ...['wire-atomic', 'wire-first-statement', 'wire-pools', 'wire-round-trips', 'matrix-sql-errors', 'matrix-connection'],
  ],
  'work that is repeated': ['retryable', 'retryable-requests', 'retryable-responses'],
};

/**
 * @typedef {object} Versions of a cell
 * @property {string} cell
 * @property {string} express
 * @property {string} knex
 * @property {string} pg
 * @property {string} postgres
 * @property {string} node
 * @property {boolean} pipeline
 */

/**
 * Tests that cannot hold with some version: file, a part of the full name, with which, and why.
 *
 * @type {[file: string, name: string, applies: (versions: Versions) => boolean, reason: string][]}
 */
const excludedTests = [
  [
    'knex-transactions',
    'for parentTransaction',
    ({ knex }) => isBelow(knex, '3.1'),
    'Knex 3.1 is the first to know parentTransaction, which the test compares; sessions have it',
  ],
  [
    'knex-events',
    'keeps the id after a savepoint, which a Knex.Transaction loses',
    ({ knex }) => isBelow(knex, '3.1'),
    'Knex 3.0 does not lose it',
  ],
];

/**
 * @param {string} version
 * @param {string} limit
 */
function isBelow(version, limit) {
  const [one, other] = [version, limit].map((text) => text.split('.').map(Number));
  const i = [0, 1, 2].find((at) => (one?.[at] ?? 0) !== (other?.[at] ?? 0)) ?? 0;
  return (one?.[i] ?? 0) < (other?.[i] ?? 0);
}

module.exports = { coreFiles, excludedTests };
