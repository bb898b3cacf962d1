import { once } from 'node:events';
import { type TestDatabase as Kit, testDatabase } from 'express-knex-session/testing';
import type { Knex } from 'knex';
import { Client } from 'pg';
import { createDatabase, type TestDatabase } from './support/database';
import { runExample } from './support/example-bench';
import { exampleIn } from './support/pages';
import { eventually } from './support/pool';

/* What docs/testing.md says cannot be as in production. (Its files are run by packaging.test.ts.) */
let database: TestDatabase;
let knex: Knex;
let kit: Kit;

beforeAll(async () => {
  database = await createDatabase();
  knex = database.knex({ log: { warn() {} } } as Knex.Config);
  kit = testDatabase(knex);
  await database.admin.raw(`
    CREATE TABLE items (id serial, at timestamptz DEFAULT now());
    CREATE FUNCTION set_inside() RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM set_config('app.inside', 'yes', true); END $$;
    CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$;
    CREATE TABLE doomed ();
    CREATE CONSTRAINT TRIGGER dies AFTER INSERT ON doomed DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION die();`);
});
afterAll(() => database.drop());

/** What an expression is, in a transaction of the app. */
async function resultOf(expression: string): Promise<unknown> {
  return kit.knex.transaction(async (trx) => (await trx.raw(`SELECT ${expression} AS value`)).rows[0].value);
}

describe('when a test goes on', () => {
  beforeEach(() => kit.begin());
  afterEach(() => kit.rollback());

  it('has one now() and one transaction id for all, and a clock that moves', async () => {
    const both = 'now()::text || pg_current_xact_id()::text';
    expect(await resultOf(both)).toBe(await resultOf(both));
    expect(await resultOf('clock_timestamp()::text')).not.toBe(await resultOf('clock_timestamp()::text'));
  });

  it('keeps a SET, and what a function has set', async () => {
    await kit.knex.raw("SET app.outside = 'yes'");
    await resultOf('set_inside()');
    expect(await resultOf("current_setting('app.outside') || current_setting('app.inside')")).toBe('yesyes');
  });

  it('ends what is local to a transaction of the app', async () => {
    await resultOf("set_config('app.local', 'yes', true)");
    expect(await resultOf("current_setting('app.local', true)")).toBe('');
  });

  it('holds the locks of its transactions, and may take them again', async () => {
    await resultOf('pg_advisory_xact_lock(1)');
    const fromElsewhere = async () => (await database.admin.raw('SELECT pg_try_advisory_xact_lock(1) AS free')).rows[0].free;
    expect(await resultOf('pg_try_advisory_xact_lock(1)')).toBe(true);
    expect(await fromElsewhere()).toBe(false);
    await kit.rollback();
    expect(await fromElsewhere()).toBe(true);
    await kit.begin();
  });

  it.each(['VACUUM items', 'CREATE INDEX CONCURRENTLY ON items (at)', 'CREATE DATABASE other'])('refuses: %s', async (sql) => {
    await expect(kit.knex.raw(sql)).rejects.toMatchObject({ code: '25001' });
    expect(await resultOf('1')).toBe(1);
  });
});

describe('when a test has ended', () => {
  it('has left no SET behind', async () => {
    await kit.inTransaction(() => kit.knex.raw("SET app.outside = 'yes'"))();
    await kit.inTransaction(async () => expect(await resultOf("current_setting('app.outside', true)")).not.toBe('yes'))();
  });

  it('has not put sequences back', async () => {
    const insert = kit.inTransaction(async () => (await kit.knex('items').insert({}).returning('id'))[0].id as number);
    expect(await insert()).toBeLessThan(await insert());
    expect(await database.admin('items')).toEqual([]);
  });

  it('has sent no NOTIFY', async () => {
    const listener = new Client({ connectionString: database.adminUrl });
    await listener.connect();
    await listener.query('LISTEN news');
    await kit.inTransaction(() => kit.knex.raw("NOTIFY news, 'from a test'"))();
    const heard = once(listener, 'notification');
    await database.admin.raw("NOTIFY news, 'from elsewhere'");
    expect((await heard)[0]).toMatchObject({ payload: 'from elsewhere' });
    await listener.end();
  });
});

describe('when the connection is lost during COMMIT', () => {
  it("takes the test's transaction with it, and not the next test", async () => {
    await kit.begin();
    await kit.knex('items').insert({});
    await expect(kit.knex('doomed').insert({})).rejects.toThrow();
    await expect(kit.knex('items')).rejects.toThrow();
    await kit.rollback();
    await kit.inTransaction(async () => expect(await kit.knex('items')).toEqual([]))();
    await eventually(() => expect(knex.client.pool.numUsed()).toBe(0));
  });
});

describe('the example of options', () => {
  it('sets the level of the tests', async () => {
    const shown: Kit = await runExample(exampleIn('testing'), { testDatabase, knex }, 'database');
    await shown.inTransaction(async () => {
      const { rows } = await shown.knex.raw('SHOW transaction_isolation');
      expect(rows).toEqual([{ transaction_isolation: 'repeatable read' }]);
    })();
  });
});
