/*
 * What `npm run matrix` runs on other versions of Express, Knex, pg, PostgreSQL and Node: of each promise the tests that touch what those
 * versions do. What it leaves out repeats these for long, is about tools, or brings servers and processes of its own.
 */

const coreFiles = {
  'what is installed': ['versions', 'versions-types'],
  'the gate': [
    ...['complete-responses', 'connections', 'failure-handlers', 'failure-headers', 'failure-late-writes', 'finish'].map(
      (name) => `gate-${name}`,
    ),
    ...['heads', 'held', 'pipelined', 'statements', 'writes'].map((name) => `gate-${name}`),
  ],
  'how a request ends': ['outcome', 'outcome-by-hand', 'outcome-decision', 'outcome-routers', 'lifecycle', 'laziness', 'with-session'],
  'a COMMIT that fails': ['commit-fails', 'commit-fails-connection', 'commit-fails-error-handlers', 'commit-fails-late-errors'],
  leaks: ['knex-pool', 'send', 'connection-commit', 'connection-context', 'connection-lost', 'connection-pool', 'connection-rollback'],
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
  'what is told of it': ['events', 'events-reasons', 'warn-after'],
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

const STATUS = 'this pg does not tell whether a connection is in a transaction';
const UNSENDABLE = 'once a parameter could not be sent, this pg never gets an answer on that connection';
const NO_POOL = 'before Knex 3.3 there is no `connectionPool`';
const REFUSED = 'in pipeline mode pg refuses streams';
const NO_PIPELINE = 'this pg has no pipeline mode';
const SENT = 'in pipeline mode the statements behind the first are on the wire already; pipeline.test.ts has what holds there';

/**
 * Tests that cannot hold with some version: file, a part of the full name, with which, and why.
 *
 * @type {[file: string, name: string, applies: (versions: Versions) => boolean, reason: string][]}
 */
const excludedTests = [
  [
    'outcome',
    'reaches no error handler, and rolls back when the client gives up',
    before('express', '5'),
    'with express-async-errors, as all tests run on this Express, the promise is not dropped',
  ],
  ['knex-transactions', 'for parentTransaction', before('knex', '3.1'), 'Knex 3.0 has no parentTransaction to compare with'],
  ['knex-events', 'which a Knex.Transaction loses', before('knex', '3.3'), 'before Knex 3.3 a Knex.Transaction does not lose it'],
  ['deadlines-acquire', 'when the pool is a pg.Pool', before('knex', '3.3'), NO_POOL],
  ['deadlines-settle', 'with a pg.Pool', before('knex', '3.3'), NO_POOL],
  ['wire-pools', "when Knex works on pg's own pool", before('knex', '3.3'), NO_POOL],
  ['wire-pools', 'that no session holds', before('knex', '3.3'), NO_POOL],
  ['versions-types', '', ({ node }) => node.startsWith('20.0.'), 'TypeScript 7 does not start on Node 20.0'],
  ['connection-pool', "does not commit another's transaction with its own", before('pg', '8.21'), STATUS],
  ['settings', 'when the first has a value that cannot be sent', before('pg', '8.22'), UNSENDABLE],
  ['wire-atomic', 'because a value cannot be sent', before('pg', '8.22'), UNSENDABLE],
  ['wire-pools', "passes on pg's refusal of a stream", before('pg', '8.23'), NO_PIPELINE],
  // All of these; elsewhere environment.js finds them out.
  ['knex-streams', '', ({ pipeline }) => pipeline, REFUSED],
  ['outcome-streams', '', ({ pipeline }) => pipeline, REFUSED],
  ['streaming-errors', '', ({ pipeline }) => pipeline, REFUSED],
  ['streaming-session', '', ({ pipeline }) => pipeline, REFUSED],
  ['connection-lost', '', ({ pipeline }) => pipeline, REFUSED],
  ['abort-statement', 'in a statement that others wait behind', ({ pipeline }) => pipeline, SENT],
  ['disconnect', 'runs none of those that wait', ({ pipeline }) => pipeline, SENT],
  ['wire-atomic', 'and sends none of them', ({ pipeline }) => pipeline, SENT],
  ['wire-round-trips', 'makes one round trip for each of ten statements', ({ pipeline }) => pipeline, SENT],
  ['deadlines-streams', 'tells of a stream what the driver says', before('pg', '8.23'), NO_PIPELINE],
];

/**
 * @param {'express' | 'knex' | 'pg'} name
 * @param {string} limit
 * @returns {(versions: Versions) => boolean}
 */
function before(name, limit) {
  return (versions) => versions[name].localeCompare(limit, 'en', { numeric: true }) < 0;
}

module.exports = { coreFiles, excludedTests, REFUSED };
