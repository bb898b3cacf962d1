import { withSession } from 'express-knex-session';
import { type TestDatabase as Kit, testDatabase } from 'express-knex-session/testing';
import request from 'supertest';
import { eventually, poolUsage } from './support/pool';
import { caught, gate, type Handler, useTestedApp } from './support/tested-app';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const tested = useTestedApp({ byHand: true, waitTimeout: 100 });

const insert = (name: string, knex = tested.knex) => knex('items').insert({ name });
const NOT_RUNNING = { code: 'ERR_TEST_NOT_RUNNING' };

describe('when no test has begun', () => {
  const works: [string, () => PromiseLike<unknown>][] = [
    ['a statement', () => insert('a')],
    ['a stream', () => tested.knex('items').stream().toArray()],
    ['knex.transaction()', () => tested.knex.transaction((trx) => insert('a', trx))],
    ['a schema change', () => tested.knex.schema.createTable('more', (table) => table.increments())],
    ['a transaction that does nothing', () => tested.knex.transaction(async () => {})],
  ];
  it.each(works)('refuses %s, before the first test and after one', async (_, work) => {
    expect(await caught(work())).toMatchObject(NOT_RUNNING);
    await tested.kit.begin();
    await tested.kit.rollback();
    expect(await caught(work())).toMatchObject(NOT_RUNNING);
    expect(await tested.own.admin.schema.hasTable('more')).toBe(false);
  });

  it('refuses a session, with the reason and the remedy', async () => {
    const unavailable = {
      code: 'ERR_SESSION_UNAVAILABLE',
      cause: { code: 'ERR_TEST_NOT_RUNNING', message: expect.stringContaining('beforeEach(database.begin)') },
    };
    await expect(withSession(tested.knex, (session) => insert('a', session))).rejects.toMatchObject(unavailable);
    const answer = await tested.answer((req) => req.session('items'));
    expect(answer).toMatchObject({ status: 503, body: { cause: 'ERR_TEST_NOT_RUNNING' } });
  });

  it('refuses rollback()', async () => {
    await expect(tested.kit.rollback()).rejects.toMatchObject({ ...NOT_RUNNING, message: 'rollback() was called without begin().' });
    await tested.kit.begin();
    await tested.kit.rollback();
    await expect(tested.kit.rollback()).rejects.toMatchObject(NOT_RUNNING);
  });
});

describe('when begin() or rollback() is called twice', () => {
  it('holds one connection, and rolls back once for each', async () => {
    await Promise.all([tested.kit.begin(), tested.kit.begin()]);
    expect(poolUsage(tested.original).used).toBe(1);
    await insert('a');
    const ends = await Promise.allSettled([tested.kit.rollback(), tested.kit.rollback(), tested.kit.rollback()]);
    expect(ends.map(({ status }) => status)).toEqual(['fulfilled', 'fulfilled', 'rejected']);
  });

  it('begins again at once after a rollback() that was not awaited', async () => {
    await tested.kit.begin();
    await insert('a');
    const rolledBack = tested.kit.rollback();
    await tested.kit.begin();
    await rolledBack;
    expect(await tested.names()).toEqual([]);
    await tested.kit.rollback();
  });
});

describe('when the database cannot be reached', () => {
  it('rejects begin() with the error of the driver, and the next one works', async () => {
    const knex = tested.own.knex({ pool: { min: 0, max: 1 } });
    const kit = testDatabase(knex);
    await knex.destroy();
    await expect(kit.begin()).rejects.toThrow('Unable to acquire a connection');
    await expect(kit.rollback()).rejects.toMatchObject(NOT_RUNNING);
    knex.initialize();
    await kit.begin();
    await kit.rollback();
    await knex.destroy();
  });
});

describe('when a file of tests has begun in beforeAll', () => {
  beforeEach(async () => {
    await tested.kit.begin();
    await insert('for all');
  });
  afterEach(async () => {
    // A rollback() too many, or one that took too much, fails here.
    expect(await tested.names()).toEqual(['for all']);
    await tested.kit.rollback();
    await tested.expectNothingLeft();
  });

  it('shows each test inside of it what is there for all, and nothing of the others', async () => {
    for (const name of ['a', 'a', 'b']) {
      await tested.kit.begin();
      const store: Handler = async (req, res) => [await insert(name, req.session), res.end()];
      expect(await tested.names()).toEqual(['for all']);
      await request(tested.app(store)).get('/').expect(200);
      expect(await tested.names()).toEqual([name, 'for all']);
      await tested.kit.rollback();
    }
  });

  it('puts constraints and settings back for the next one', async () => {
    for (let i = 0; i < 2; i++) {
      await tested.kit.begin();
      const level = (await tested.knex.raw("SELECT current_setting('application_name') AS name")).rows[0].name;
      expect(level).toBe('');
      await tested.knex.raw("SET application_name = 'changed'");
      await insert('a');
      await expect(insert('a')).rejects.toMatchObject({ constraint: 'late' });
      await tested.kit.rollback();
    }
  });

  it('runs wrapped tests in it', async () => {
    await tested.kit.inTransaction(() => insert('a'))();
    await tested.kit.inTransaction(() => insert('a'))();
  });

  it('ends the test alone in which something was left open', async () => {
    await tested.kit.begin();
    await insert('a', await tested.knex.transaction());
    await expect(tested.kit.rollback()).rejects.toMatchObject({ code: 'ERR_TEST_LEFT_OPEN' });
  });

  it('refuses begin() while a transaction is open, and names whose', async () => {
    const trx = await tested.knex.transaction();
    await expect(tested.kit.begin()).rejects.toMatchObject({
      code: 'ERR_TEST_LEFT_OPEN',
      message: expect.stringContaining('the test had'),
    });
    await trx.rollback();
  });
});

describe('when a test is wrapped by inTransaction()', () => {
  it.each(['first', 'second'])('passes arguments and result, and takes all back: the %s', async () => {
    const wrapped = tested.kit.inTransaction(async (name: string, count: number) => {
      expect(await tested.names()).toEqual([]);
      await insert(`${name} ${count}`);
      return (await tested.names())[0];
    });
    expect(wrapped).toHaveLength(0);
    expect(await wrapped('item', 2)).toBe('item 2');
    expect(await tested.kit.inTransaction(() => 'at once')()).toBe('at once');
    await expect(insert('a')).rejects.toMatchObject(NOT_RUNNING);
  });

  it("rejects with the test's error, whose cause is what the kit says", async () => {
    const failure = new RangeError('no');
    const plain = tested.kit.inTransaction(async () => {
      await insert('a');
      throw failure;
    });
    await expect(plain()).rejects.toBe(failure);
    expect(failure.cause).toBeUndefined();
    const leaves = tested.kit.inTransaction(async () => {
      await insert('a', await tested.knex.transaction());
      throw failure;
    });
    await expect(leaves()).rejects.toBe(failure);
    expect(failure.cause).toMatchObject({ code: 'ERR_TEST_LEFT_OPEN' });
    const hasCause = new RangeError('no', { cause: 'its own' });
    const sync = tested.kit.inTransaction(() => {
      throw hasCause;
    });
    await expect(sync()).rejects.toBe(hasCause);
    expect(hasCause.cause).toBe('its own');
  });

  it('rejects with what the kit says, if the test has passed', async () => {
    const leaves = tested.kit.inTransaction(async () => insert('a', await tested.knex.transaction()));
    await expect(leaves()).rejects.toMatchObject({ code: 'ERR_TEST_LEFT_OPEN' });
  });

  it('takes nothing from the next test when it ends late, after a timeout of the runner', async () => {
    const late = gate();
    const first = caught(tested.kit.inTransaction(async () => [await insert('a'), await late.opened])());
    await eventually(async () => expect(await tested.names()).toEqual(['a']));
    await tested.kit.begin();
    await insert('b');
    late.open();
    expect(await first).toMatchObject({ code: 'ERR_TEST_NOT_RUNNING', message: expect.stringContaining('ended late') });
    expect(await tested.names()).toEqual(['b']);
    await tested.kit.rollback();
    await expect(tested.kit.rollback()).rejects.toMatchObject(NOT_RUNNING);
  });
});

describe('when testDatabase() gets what it cannot use', () => {
  it.each<[string, unknown[], RegExp]>([
    ['nothing', [], /Expected `knex` to be a Knex instance, got undefined/],
    ['a configuration', [{ client: 'pg' }], /Expected `knex` to be a Knex instance/],
    [
      'a misspelt option',
      [() => tested.original, { isolation: 'serializable' }],
      /Unknown option `isolation`\. testDatabase\(\) takes: isolationLevel, waitTimeout\./,
    ],
    [
      'an unknown level',
      [() => tested.original, { isolationLevel: 'SERIALIZABLE' }],
      /Expected `isolationLevel` to be one of 'read uncommitted', .* got "?'?SERIALIZABLE/,
    ],
    ['a time of 0', [() => tested.original, { waitTimeout: 0 }], /Expected `waitTimeout` to be .* from 1/],
    ['a time as text', [() => tested.original, { waitTimeout: '1s' }], /Expected `waitTimeout` to be /],
    ['options that are null', [() => tested.original, null], /Expected options to be an object/],
    ['options that are a number', [() => tested.original, 5], /Expected options to be an object/],
  ])('says what it expected, for %s', (_, [knex, ...rest], message) => {
    const make = () => (testDatabase as any)(typeof knex === 'function' ? knex() : knex, ...rest);
    expect(make).toThrow(TypeError);
    expect(make).toThrow(message);
  });

  it('refuses a transaction, a session, and a Knex of its own', async () => {
    const refused = /Expected `knex` to be a Knex instance, got/;
    await tested.original.transaction(async (trx) => expect(() => testDatabase(trx)).toThrow(refused));
    await withSession(tested.original, async (session) => expect(() => testDatabase(session)).toThrow(refused));
    expect(() => testDatabase(tested.knex)).toThrow(TypeError);
  });

  it('says what inTransaction() expected', () => {
    expect(() => tested.kit.inTransaction(undefined as never)).toThrow(/Expected .* a function/);
  });
});

describe('when both pools are destroyed', () => {
  it('does not hang, after a test that has left things open as well', async () => {
    const original = tested.own.knex({ log: { warn() {} } });
    const kit: Kit = testDatabase(original, { waitTimeout: 10 });
    await kit.begin();
    await insert('a', await kit.knex.transaction());
    await expect(kit.rollback()).rejects.toMatchObject({ code: 'ERR_TEST_LEFT_OPEN' });
    await eventually(() => expect([poolUsage(original).used, poolUsage(kit.knex).used]).toEqual([0, 0]));
    await Promise.all([original.destroy(), kit.knex.destroy()]);
  });
});
