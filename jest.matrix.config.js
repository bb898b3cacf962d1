const { existsSync } = require('node:fs');
const { join } = require('node:path');
const base = require('./jest.config.js');
const { coreFiles } = require('./__tests__/support/in-matrix.js');

/** Where a cell has installed the versions that it tries; whatever is not there is this project's own. */
const { modules = '', versions = {} } = JSON.parse(process.env['MATRIX_CELL'] ?? '{}');

/** @param {string} name */
const placeOf = (name) => [modules, join(__dirname, 'node_modules')].map((place) => join(place, name)).find(existsSync) ?? name;
const isExpress4 = /^4\./.test(versions.express);

/** The core's tests again, on other versions: see tools/matrix.mjs. @type {import('jest').Config} */
module.exports = {
  ...base,
  displayName: versions.cell ?? 'matrix',
  testMatch: Object.values(coreFiles)
    .flat()
    .map((name) => `<rootDir>/__tests__/${name}.test.ts`),
  testEnvironmentOptions: { versions },
  ...(versions.pipeline && { setupFiles: ['<rootDir>/__tests__/support/pg-in-pipeline.js'] }),
  moduleNameMapper: {
    ...base.moduleNameMapper,
    // For every module, those in the cell's folder too: one copy of each, as in an app.
    ...Object.fromEntries(
      ['express', 'knex', 'pg', 'pg-query-stream'].flatMap((name) => [
        [`^${name}$`, placeOf(name)],
        [`^${name}/(.*)$`, `${placeOf(name)}/$1`],
      ]),
    ),
    ...(isExpress4 && {
      '^express4$': placeOf('express'),
      '^express$': '<rootDir>/__tests__/support/express-with-async-errors.js',
      '^express-async-errors$': placeOf('express-async-errors'),
    }),
  },
  // A slower machine, and a process more for each way through it.
  testTimeout: 40_000,
};
