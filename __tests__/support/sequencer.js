const { basename } = require('node:path');
const { default: Sequencer } = require('@jest/test-sequencer');

/** They wait or work for long: begun last, they would leave the other workers idle. Jest knows that only from an earlier run. */
const LONG = ['chaos', 'example-app-live-page', 'launcher', 'example-app-shutdown', 'random-ends', 'packaging', 'types'];

module.exports = class extends Sequencer {
  /**
   * @param {Parameters<Sequencer['sort']>[0]} tests
   * @override
   */
  async sort(tests) {
    const sorted = [...(await super.sort(tests))];
    const isLong = (/** @type {{ path: string }} */ { path }) => LONG.includes(basename(path, '.test.ts'));
    return [...sorted.filter(isLong), ...sorted.filter((test) => !isLong(test))];
  }
};
