const { EventEmitter } = require('node:events');
const { basename } = require('node:path');
const { TestEnvironment } = require('jest-environment-node');
const { excludedTests } = require('./behind-pgbouncer.js');

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
   * Skips what cannot be run in `npm run test:pgbouncer`: see behind-pgbouncer.js.
   *
   * @param {import('@jest/types').Circus.AsyncEvent} event
   * @param {import('@jest/types').Circus.State} state
   */
  async handleTestEvent(event, state) {
    if (event.name !== 'run_start' || !this.isPooled) return;
    const exclusions = this.isMissing
      ? [{ name: '', reason: 'PgBouncer is not installed' }]
      : excludedTests.filter(([file]) => file === this.file).map(([, name, reason]) => ({ name, reason }));
    for (const { name, reason } of exclusions) {
      if (!skipTests(state.rootDescribeBlock, name, reason) && !this.isMissing) {
        throw new Error(`behind-pgbouncer.js names a test that is not there: ${this.file}: ${name}`);
      }
    }
  }
};

/**
 * @param {DescribeBlock} block
 * @param {string} name a part of the full name
 * @param {string} reason
 * @param {string} [path]
 * @returns {boolean} whether there was any such test
 */
function skipTests(block, name, reason, path = '') {
  let isFound = false;
  for (const child of block.children) {
    const fullName = `${path}${child.name}`;
    if (child.type === 'describeBlock') {
      isFound = skipTests(child, name, reason, `${fullName} `) || isFound;
    } else if (fullName.includes(name)) {
      child.mode = 'skip';
      child.name += ` (skipped behind PgBouncer: ${reason})`;
      isFound = true;
    }
  }
  return isFound;
}
