const { EventEmitter } = require('node:events');
const { basename } = require('node:path');
const { TestEnvironment } = require('jest-environment-node');
const behindPgBouncer = require('./behind-pgbouncer.js');
const inMatrix = require('./in-matrix.js');

/**
 * @typedef {import('@jest/types').Circus.DescribeBlock} DescribeBlock
 * @typedef {import('../../tools/pgbouncer.mjs').PgBouncer} PgBouncer
 */

module.exports = class extends TestEnvironment {
  /**
   * @param {import('@jest/environment').JestEnvironmentConfig} config
   * @param {import('@jest/environment').EnvironmentContext} context
   */
  constructor(config, context) {
    super(config, context);
    const { versions } = config.projectConfig.testEnvironmentOptions;
    /** Of a cell of `npm run matrix`. @type {import('./in-matrix.js').Versions | undefined} */
    this.versions = /** @type {any} */ (versions);
    this.isPooled = config.projectConfig.testEnvironmentOptions['pgbouncer'] === true;
    this.isMissing = this.isPooled && process.env['TEST_PGBOUNCER_PROGRAM'] === undefined;
    this.file = basename(context.testPath, '.test.ts');
    /** @type {PgBouncer | undefined} */
    this.pooler = undefined;
    /** @type {string | undefined} */
    this.fatal = undefined;
  }

  /** Jest gives tests a copy of `process`, whose listeners never hear anything. This hands them the real one: see warnings.ts. @override */
  async setup() {
    await super.setup();
    // Where nothing is run, nothing would take its listeners away again.
    Object.assign(this.global, { realProcess: this.isMissing ? new EventEmitter() : process });
    if (this.isPooled && !this.isMissing) await this.startPooler();
  }

  /** One for each file: if it dies, that is the failure of this file and of no other. */
  async startPooler() {
    const { startPgBouncer } = await import('../../tools/pgbouncer.mjs');
    this.pooler = await startPgBouncer({
      databaseUrl: /** @type {string} */ (process.env['TEST_DATABASE_URL']),
      log: (line) => {
        if (/ FATAL @/.test(line)) this.fatal = line;
      },
    });
    this.global.process.env['TEST_PGBOUNCER_URL'] = this.pooler.url;
  }

  /** @override */
  async teardown() {
    await this.pooler?.stop();
    await super.teardown();
    if (this.fatal) throw new Error(`PgBouncer died: ${this.fatal}`);
  }

  /**
   * Skips what cannot be run in `npm run test:pgbouncer` or in a cell of `npm run matrix`: see behind-pgbouncer.js, in-matrix.js.
   *
   * @param {import('@jest/types').Circus.AsyncEvent} event
   * @param {import('@jest/types').Circus.State} state
   */
  async handleTestEvent(event, state) {
    if (this.versions?.pipeline) this.skipRefusedStreams(event);
    if (event.name !== 'run_start') return;
    for (const [name, why] of this.exclusions()) {
      if (!skipTests(state.rootDescribeBlock, name, why) && !this.isMissing) {
        throw new Error(`A test that is to be skipped is not there: ${this.file}: ${name}`);
      }
    }
  }

  /**
   * Which tests read rows as a stream is not to be seen from their names: those that fail after pg has refused one are skipped.
   *
   * @param {import('@jest/types').Circus.AsyncEvent} event
   */
  skipRefusedStreams(event) {
    const seen = /** @type {{ hasRefusedStream?: boolean }} */ (/** @type {unknown} */ (this.global));
    if (event.name === 'test_start') seen.hasRefusedStream = false;
    if (event.name !== 'test_done' || event.test.errors.length === 0 || !seen.hasRefusedStream) return;
    const { test } = event;
    Object.assign(test, {
      errors: [],
      status: 'skip',
      mode: 'skip',
      name: `${test.name} (skipped in the matrix: ${inMatrix.REFUSED})`,
    });
  }

  /** @returns {[name: string, why: string][]} */
  exclusions() {
    if (this.isMissing) return [['', 'skipped behind PgBouncer: PgBouncer is not installed']];
    const { versions, file } = this;
    if (versions) {
      const excluded = inMatrix.excludedTests.filter(([of, , applies]) => of === file && applies(versions));
      return excluded.map(([, name, , reason]) => [name, `skipped in the matrix: ${reason}`]);
    }
    const excluded = this.isPooled ? behindPgBouncer.excludedTests.filter(([of]) => of === file) : [];
    return excluded.map(([, name, reason]) => [name, `skipped behind PgBouncer: ${reason}`]);
  }
};

/**
 * @param {DescribeBlock} block
 * @param {string} name a part of the full name
 * @param {string} why
 * @param {string} [path]
 * @returns {boolean} whether there was any such test
 */
function skipTests(block, name, why, path = '') {
  let isFound = false;
  for (const child of block.children) {
    const fullName = `${path}${child.name}`;
    if (child.type === 'describeBlock') {
      isFound = skipTests(child, name, why, `${fullName} `) || isFound;
    } else if (fullName.includes(name)) {
      child.mode = 'skip';
      child.name += ` (${why})`;
      isFound = true;
    }
  }
  return isFound;
}
