const { TestEnvironment } = require('jest-environment-node');

/** Jest gives tests a copy of `process`, whose listeners never hear anything. This hands them the real one: see warnings.ts. */
module.exports = class extends TestEnvironment {
  /** @override */
  async setup() {
    await super.setup();
    Object.assign(this.global, { realProcess: process });
  }
};
