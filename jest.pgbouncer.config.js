const { excludedFiles } = require('./__tests__/support/behind-pgbouncer.js');

/** The core's tests again, with a PgBouncer between the app's pools and the server. @type {import('jest').Config} */
module.exports = {
  ...require('./jest.config.js'),
  displayName: 'PgBouncer',
  testPathIgnorePatterns: Object.keys(excludedFiles).map((name) => `<rootDir>/__tests__/${name}\\.test\\.ts$`),
  testEnvironmentOptions: { pgbouncer: true },
  // Every message takes one process more.
  testTimeout: 40_000,
};
