import { type TestDatabase, type TestDatabaseOptions, testDatabase } from 'express-knex-session/testing';
import createKnex, { type Knex } from 'knex';

async function main(): Promise<void> {
  const knex = createKnex({ client: 'pg', connection: process.env['DATABASE_URL'] ?? '' });
  const options: TestDatabaseOptions = { isolationLevel: 'serializable', waitTimeout: undefined };
  const database: TestDatabase = testDatabase(knex, options);
  const testKnex: Knex = database.knex;
  // @ts-expect-error: no such level
  options.isolationLevel = 'chaos';
  // What a test is given, by it.each for one, and what it gives back.
  const test = database.inTransaction(async (text: string, count: number): Promise<string[]> => {
    await testKnex('notes').insert(Array.from({ length: count }, () => ({ text })));
    return testKnex('notes');
  });
  // @ts-expect-error: a number is missing
  void (() => test('in a test'));
  const rows: string[] = await test('in a test', 1);
  console.log(JSON.stringify(rows));
  await knex.destroy();
}

void main();
