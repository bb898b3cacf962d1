import { type SessionOptions, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { caught, comparable, type Handler, knexOf, useTestedApp } from './support/tested-app';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const tested = useTestedApp();

/** Answers with what it gives; with an error, if it fails. */
const does =
  (work: (session: Knex.Transaction, knex: Knex) => unknown): Handler =>
  async (req, res) => {
    res.json({ result: (await work(req.session, knexOf(req))) ?? 'done' });
  };
const TWICE = [{ name: 'twice' }, { name: 'twice' }];
const insert = (name: string, place?: number) => does((session) => session('items').insert({ name, place }));
const insertTwice = does((session) => session('items').insert(TWICE));

/** The requests are answered in the same way with the kit and without it. @returns the statuses */
async function expectTheSame(handlers: Handler[], options?: SessionOptions): Promise<number[]> {
  const answers = await tested.answers(handlers, options);
  expect(answers.tested.map(comparable)).toEqual(answers.inProduction.map(comparable));
  return answers.tested.map(({ status }) => status);
}

describe('when a deferred constraint is broken at a commit', () => {
  const ways: [string, Handler, SessionOptions?][] = [
    [
      'a request with a response that is taken back',
      async (req, res) => {
        await req.session('items').insert(TWICE);
        res.status(201).cookie('made', '1').location('/items/1').set({ 'Cache-Control': 'public', ETag: '"1"' }).json({ ok: true });
      },
    ],
    ["a request with commitAt: 'end'", insertTwice, { commitAt: 'end' }],
    ['req.session.commit()', does(async (session) => [await session('items').insert(TWICE), await session.commit()])],
    ['knex.transaction()', does((_, knex) => knex.transaction((trx) => trx('items').insert(TWICE)))],
    ['a statement of the root knex', does((_, knex) => knex('items').insert(TWICE))],
    ['withSession()', does((_, knex) => withSession(knex, (session) => session('items').insert(TWICE)))],
    ['a savepoint in it', does((session) => session.transaction((trx) => trx('items').insert(TWICE)))],
  ];
  it.each(ways)('fails %s as in production, and leaves nothing (71)', async (...[, handler, options]) => {
    const statuses = await expectTheSame([insert('before'), handler, insert('after')], options);
    expect(statuses).toEqual([200, 500, 200]);
    expect(await tested.names()).toEqual(['after', 'before']);
  });

  it('gives the error of the driver, with its code and the name of the constraint (71)', async () => {
    const { body, headers } = await tested.answer(async (req, res) => {
      await req.session('items').insert(TWICE);
      res.cookie('made', '1').sendStatus(201);
    });
    expect(body).toMatchObject({ code: '23505', constraint: 'late' });
    expect(headers).not.toHaveProperty('set-cookie');
  });

  it('fails a statement of the test, and its transactions, as well (71)', async () => {
    const refusal = { code: '23505', constraint: 'late' };
    expect(await caught(tested.knex('items').insert(TWICE))).toMatchObject(refusal);
    expect(await caught(tested.knex.transaction((trx) => trx('items').insert(TWICE)))).toMatchObject(refusal);
    const trx = await tested.knex.transaction();
    await trx('items').insert(TWICE);
    await trx.commit();
    expect(await caught(trx.executionPromise)).toMatchObject(refusal);
    expect(await tested.names()).toEqual([]);
  });

  it('reports it to onError with commitAt: finish, as the response has gone', async () => {
    const reported: unknown[] = [];
    const answer = await tested.answer(insertTwice, { commitAt: 'finish', onError: (error) => reported.push(error) });
    expect(answer.status).toBe(200);
    expect(await tested.names()).toEqual([]);
    expect(reported).toMatchObject([{ code: '23505' }]);
  });
});

describe('when a deferred trigger writes', () => {
  const notes = does((session) => session('notes').pluck('text'));

  it('has run for the next request, and not for a request that was rolled back (71)', async () => {
    const rolledBack: Handler = async (req, res) => {
      await req.session('items').insert({ name: 'noted, and lost' });
      res.status(400).end();
    };
    const during = does(async (session) => [await session('items').insert({ name: 'noted' }), await session('notes')][1]);
    expect(await expectTheSame([during, notes, rolledBack, notes])).toEqual([200, 200, 400, 200]);
    expect(await tested.knex('notes').pluck('text')).toEqual([expect.stringMatching(/^noted by /)]);
  });

  it('runs with the role of the request', async () => {
    const [{ role }] = (await tested.knex.raw("SELECT 'role_of_' || current_database() AS role")).rows;
    await tested.knex.raw(
      `CREATE ROLE ${role}; GRANT ALL ON ALL TABLES IN SCHEMA public TO ${role}; GRANT USAGE ON items_id_seq TO ${role}`,
    );
    const asRole = does(async (session) => {
      await session.raw(`SET LOCAL ROLE ${role}`);
      await session('items').insert({ name: 'noted' });
    });
    expect(await tested.answer(asRole)).toMatchObject({ status: 200 });
    expect((await tested.answer(notes)).body.result).toEqual([`noted by ${role}`]);
    expect((await tested.knex.raw('SELECT current_user = session_user AS same')).rows).toEqual([{ same: true }]);
  });
});

describe('when a request has changed when constraints are checked', () => {
  const modes = ['ALL IMMEDIATE', 'ALL DEFERRED', 'late IMMEDIATE', 'prompt DEFERRED'];
  const twiceForAMoment = does(async (session) => {
    await session('items').insert([{ name: 'a' }, { name: 'a' }]);
    await session('items').where({ name: 'a' }).del();
  });
  const twoInOnePlace = (trx: Knex) => trx('items').insert(['b', 'c'].map((name) => ({ name, place: 1 })));
  const samePlaces = does((session) => twoInOnePlace(session));

  it('checks those INITIALLY IMMEDIATE at once and those INITIALLY DEFERRED at the end, request after request (40)', async () => {
    const statuses = await expectTheSame([twiceForAMoment, samePlaces, insert('x', 1), twiceForAMoment, samePlaces, insert('x', 2)]);
    expect(statuses).toEqual([200, 500, 200, 200, 500, 500]);
    expect((await tested.answer(samePlaces)).body).toMatchObject({ constraint: 'prompt' });
  });

  it.each(modes)('has them as before for the next one after SET CONSTRAINTS %s, committed or not (40)', async (mode) => {
    const sets = does((session) => session.raw(`SET CONSTRAINTS ${mode}`).then(() => 'set'));
    const refused: Handler = async (req, res) => [await req.session.raw(`SET CONSTRAINTS ${mode}`), res.status(400).end()];
    const caughtAtOnce = does((session) => caught(session.transaction(twoInOnePlace)).then(({ constraint }) => constraint));
    const handlers = [sets, twiceForAMoment, caughtAtOnce, refused, twiceForAMoment, caughtAtOnce];
    expect(await expectTheSame(handlers)).toEqual([200, 200, 200, 400, 200, 200]);
    await tested.knex.raw(`SET CONSTRAINTS ${mode}`);
    expect((await tested.answer(twiceForAMoment)).status).toBe(200);
    expect((await tested.answer(caughtAtOnce)).body).toEqual({ result: 'prompt' });
  });

  it('knows constraints by names that must be quoted, in other schemas, of partitions and of temporary tables (40)', async () => {
    await tested.knex.raw(`
      CREATE SCHEMA "a ""b"" 'c'.d";
      CREATE TABLE "a ""b"" 'c'.d"."T" (n int CONSTRAINT "it's ""odd"".x" UNIQUE DEFERRABLE);
      CREATE TABLE parts (n int, CONSTRAINT part UNIQUE (n) DEFERRABLE) PARTITION BY LIST (n);
      CREATE TABLE part_1 PARTITION OF parts FOR VALUES IN (1);
      CREATE TABLE wholes (n int PRIMARY KEY) PARTITION BY LIST (n);
      CREATE TABLE refers (n int REFERENCES wholes DEFERRABLE INITIALLY DEFERRED, EXCLUDE USING btree (n WITH =) DEFERRABLE);
      CREATE TEMP TABLE passing (n int UNIQUE DEFERRABLE)`);
    for (const table of [`"a ""b"" 'c'.d"."T"`, 'parts', 'passing', 'refers']) {
      const once = (trx: Knex) => trx.raw(`INSERT INTO ${table} VALUES (1), (1)`);
      const { body } = await tested.answer(does((session) => caught(session.transaction(once)).then(({ code }) => code)));
      expect(body.result).toMatch(/23505|23P01/);
    }
    const dangling = (rest: string) => tested.answer(does((session) => session.raw(`INSERT INTO refers VALUES (2); ${rest}`)));
    expect((await dangling('DELETE FROM refers')).status).toBe(200);
    expect((await dangling('SELECT 1')).body).toMatchObject({ code: '23503' });
  });
});

describe('when a request changes settings for its transaction', () => {
  const SETTINGS = ['app.tenant', 'timezone', 'statement_timeout', 'search_path', 'role', 'client_encoding', 'application_name'];
  const show = does(async (session) => {
    const { rows } = await session.raw(`SELECT ${SETTINGS.map((name, i) => `current_setting('${name}', true) AS s${i}`).join(', ')}`);
    // Never set on this connection, or put back: '' after a commit, NULL after a rollback.
    return Object.values(rows[0]).map((value) => value || null);
  });
  const ways: [string, ...unknown[]][] = [
    ["SET LOCAL app.tenant = 'it''s one'"],
    ['SET LOCAL "app"."tenant" TO one'],
    ["  set\n local\ttimezone to 'Asia/Tokyo'; SELECT 1"],
    ["SET LOCAL TIME ZONE 'Asia/Tokyo'"],
    ['SELECT set_config(?, ?, true)', 'app.tenant', 'one'],
    ["SELECT pg_catalog.set_config('app.tenant', 'one', true), set_config('timezone', ?, true)", 'Asia/Tokyo'],
    ['SET LOCAL search_path TO pg_catalog, "odd"'],
    ["SET LOCAL statement_timeout = 5000; SET LOCAL application_name = 'x'"],
    ['SET LOCAL ROLE pg_monitor'],
    ["SET LOCAL SCHEMA 'odd'; SET LOCAL NAMES 'LATIN1'"],
    ["SET /* for this one */ LOCAL app.tenant = 'one' -- only"],
    ['SET LOCAL "app.tenant" = 1'],
    ["DO $$ BEGIN PERFORM set_config('app.tenant', 'one', true); END $$"],
  ];
  it.each(ways)('puts them back after %s, committed or not', async (...[sql, ...bindings]) => {
    const run =
      (status: number): Handler =>
      async (req, res) => {
        await req.session.raw(sql, bindings as string[]);
        const inside = (await req.session.raw('SELECT current_setting(?, true) AS value', ['app.tenant'])).rows;
        res.status(status).json(inside);
      };
    expect(await expectTheSame([show, run(200), show, run(400), show])).toEqual([200, 200, 200, 400, 200]);
  });

  it.each([
    "SELECT 'set local anything' AS text",
    'SELECT 1 -- set local anything',
    "SELECT 'set_config(''a'', ''b'', true)'",
    'SET LOCAL TRANSACTION READ ONLY',
    'SET LOCAL transaction_read_only = on',
    "SELECT set_config('transaction_read_only', 'on', true)",
  ])('commits %s as in production', async (sql) => {
    const run = does(async (session) => [await session('items'), await session.raw(sql)].length);
    expect(await expectTheSame([run, insert('a')])).toEqual([200, 200]);
  });

  it('commits when a setting that does not exist was refused in a savepoint', async () => {
    const tries = does((session) => caught(session.transaction((trx) => trx.raw('SET LOCAL nonsense = 1'))).then(({ code }) => code));
    const both = does((session) =>
      caught(session.transaction((trx) => trx.raw("SELECT set_config('nonsense', '1', true)"))).then(({ code }) => code),
    );
    expect(await expectTheSame([tries, both, insert('a')])).toEqual([200, 200, 200]);
  });

  it('puts back those of a statement by itself, of the test and of its transactions', async () => {
    const before = (await tested.answer(show)).body;
    await tested.knex.raw("SET LOCAL timezone = 'Asia/Tokyo'");
    await tested.knex.transaction((trx) => trx.raw("SELECT set_config('app.tenant', 'one', true)"));
    expect((await tested.answer(show)).body).toEqual(before);
  });

  it('keeps what was set for the whole connection, up to the end of the test', async () => {
    await tested.answer(does((session) => session.raw("SET application_name = 'kept'")));
    expect((await tested.answer(show)).body.result.at(-1)).toBe('kept');
    await tested.kit.rollback();
    await tested.kit.begin();
    expect((await tested.answer(show)).body.result.at(-1)).toBe(null);
  });
});

describe('when a transaction is read-only', () => {
  const reads = (work: (trx: Knex.Transaction) => Promise<unknown>) => does((_, knex) => knex.transaction(work, { readOnly: true }));
  const readOnly: [string, Handler][] = [
    ['knex.transaction(..., { readOnly: true })', reads((trx) => trx('items').insert({ name: 'a' }))],
    [
      'SET TRANSACTION READ ONLY',
      does(async (session) => [await session.raw('SET TRANSACTION READ ONLY'), await session('items').insert({ name: 'a' })]),
    ],
    [
      'SET TRANSACTION READ ONLY in one text',
      does((session) => session.raw("SET TRANSACTION READ ONLY; INSERT INTO items (name) VALUES ('a')")),
    ],
  ];
  it.each(readOnly)('refuses a write after %s with 25006, and the next request writes', async (_, handler) => {
    expect(await expectTheSame([handler, insert('b'), handler])).toEqual([500, 200, 500]);
    expect((await tested.answer(handler)).body).toMatchObject({ code: '25006' });
    expect(await tested.names()).toEqual(['b']);
  });

  it('leaves the next one writable when it has only read', async () => {
    const setsIt = does((session) => session.raw('SET TRANSACTION READ ONLY').then(() => session('items').pluck('name')));
    const together = does((session) => session.raw('SET TRANSACTION READ ONLY; SELECT 1').then(() => 'read'));
    const handlers = [reads(async (trx) => trx('items').pluck('name')), insert('a'), setsIt, insert('b'), together, insert('c')];
    expect(await expectTheSame(handlers)).toEqual([200, 200, 200, 200, 200, 200]);
    expect(await tested.names()).toEqual(['a', 'b', 'c']);
  });
});

describe('when an error of a statement is swallowed', () => {
  const swallows = does((session) =>
    session('items')
      .insert({ name: 'bad' })
      .catch(() => 'swallowed'),
  );
  const plainly = does((_, knex) =>
    knex.transaction(
      async (trx) => [await trx('items').insert({ name: 'lost' }), await caught(trx('items').insert({ name: 'bad' }))].length,
    ),
  );

  it('fails the request as in production, and the next one is served', async () => {
    expect(await expectTheSame([insert('a'), swallows, insert('b'), plainly])).toEqual([200, 500, 200, 200]);
    expect((await tested.answer(swallows)).body).toMatchObject({ code: 'ERR_TRANSACTION_ABORTED', cause: '23514' });
    expect(await tested.names()).toEqual(['a', 'b']);
  });
});

describe('when the handler ends its session itself', () => {
  const ends =
    (end: 'commit' | 'rollback', status: number): Handler =>
    async (req, res) => {
      await req.session('items').insert({ name: `${end} ${status}` });
      await req.session[end]();
      res.status(status).json([req.session.outcome, (await caught(req.session('items'))).code]);
    };

  it('decides by that, whatever the response says', async () => {
    await expectTheSame([ends('commit', 400), ends('rollback', 200), ends('commit', 200), ends('rollback', 400)]);
    expect(await tested.names()).toEqual(['commit 200', 'commit 400']);
    expect((await tested.answer(ends('rollback', 201))).body).toEqual(['rolled back', 'ERR_SESSION_CLOSED']);
  });
});
