/** @type {import('jest').Config} */
module.exports = {
  testEnvironment: '<rootDir>/__tests__/support/environment.js',
  testMatch: ['<rootDir>/__tests__/**/*.test.ts'],
  modulePathIgnorePatterns: ['<rootDir>/dist/'],
  moduleNameMapper: {
    '^express-knex-session$': '<rootDir>/lib/index.ts',
    '^express-knex-session/testing$': '<rootDir>/lib/testing.ts',
    '^express-knex-session/opentelemetry$': '<rootDir>/lib/opentelemetry.ts',
  },
  transform: {
    '\\.ts$': [
      '@swc/jest',
      { jsc: { parser: { syntax: 'typescript' }, target: 'es2022' }, module: { type: 'commonjs' }, sourceMaps: 'inline' },
    ],
  },
  globalSetup: '<rootDir>/__tests__/support/global-setup.mjs',
  globalTeardown: '<rootDir>/__tests__/support/global-teardown.mjs',
  testSequencer: '<rootDir>/__tests__/support/sequencer.js',
  // For 2 cores: many tests wait, for deadlines or for processes.
  maxWorkers: 3,
  testTimeout: 20_000,
};
