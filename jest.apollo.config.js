const { join } = require('node:path');
const base = require('./jest.config.js');

/** The folder in which tools/apollo.mjs has installed Apollo Server. */
const modules = process.env['APOLLO_MODULES'];
if (!modules) throw new Error('Run `npm run test:apollo`, which installs Apollo Server in a folder of its own.');

/** Our sessions under Apollo Server. @type {import('jest').Config} */
module.exports = {
  ...base,
  displayName: 'Apollo',
  testMatch: ['<rootDir>/__tests__/apollo/mutations.ts'],
  // What Apollo itself requires, its files find from where they are.
  moduleNameMapper: { ...base.moduleNameMapper, '^(@apollo/server|@as-integrations/express5)$': join(modules, '$1') },
};
