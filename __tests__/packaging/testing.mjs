import { SessionError } from 'express-knex-session';
import { testDatabase } from 'express-knex-session/testing';
import createKnex from 'knex';

const knex = createKnex({ client: 'pg', connection: process.env['DATABASE_URL'] });
const { knex: testKnex, inTransaction, rollback } = testDatabase(knex);
await inTransaction(async () => {
  await testKnex('notes').insert({ text: 'in a test' });
  console.log(JSON.stringify(await testKnex('notes')));
})();
const error = await rollback().catch((error) => error);
if (!(error instanceof SessionError)) throw error;
await knex.destroy();
