import pg from 'pg';
import { engines, floors } from '../tools/matrix/cells.js';
import { createDatabase, type TestDatabase } from './support/database';
import type { Versions } from './support/in-matrix.js';

/** What the cell of `npm run matrix` has installed; in `npm test` nothing is asked for, but the ranges. */
const asked: Partial<Versions> = JSON.parse(process.env['MATRIX_CELL'] ?? '{}').versions ?? {};

let database: TestDatabase;
beforeAll(async () => {
  database = await createDatabase();
});
afterAll(() => database.drop());

const isAtLeast = (version: string, floor: string) => version.localeCompare(floor, 'en', { numeric: true }) >= 0;

describe('what the tests run on', () => {
  it('is the Express that was asked for', () => {
    const { version } = require('express/package.json');
    expect(version).toBe(asked.express ?? version);
    expect(floors.express.some((floor) => version.split('.')[0] === floor.split('.')[0] && isAtLeast(version, floor))).toBe(true);
  });

  it('is the Knex that was asked for', () => {
    const { version } = require('knex/package.json');
    expect(version).toBe(asked.knex ?? version);
    expect(isAtLeast(version, floors.knex[0] as string)).toBe(true);
  });

  it('is the pg that was asked for, one copy of it for Knex and for all', () => {
    const { version } = require('pg/package.json');
    expect(version).toBe(asked.pg ?? version);
    expect(database.admin.client.driver).toBe(pg);
    expect(isAtLeast(version, floors.pg[0] as string)).toBe(true);
  });

  it('is the PostgreSQL that was asked for', async () => {
    const { rows } = await database.admin.raw('SHOW server_version');
    const version = rows[0].server_version.split(' ')[0];
    expect(version).toBe(asked.postgres ?? version);
    expect(Number.parseInt(version, 10)).toBeGreaterThanOrEqual(floors.postgres);
  });

  it('is the Node that was asked for', () => {
    expect(process.versions.node).toBe(asked.node ?? process.versions.node);
    expect(engines.node).toBe(`>=${floors.node}`);
    expect(Number.parseInt(process.versions.node, 10)).toBeGreaterThanOrEqual(floors.node);
  });

  it('pipelines if that was asked for, and only then', async () => {
    const connection = await database.admin.client.acquireConnection();
    database.admin.client.releaseConnection(connection);
    expect(connection.pipeline ?? false).toBe(asked.pipeline ?? false);
  });
});
