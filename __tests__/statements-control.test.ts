import type { Session } from 'express-knex-session';
import { failOnWarnings } from './support/warnings';
import { type Bench, useBench } from './support/wire';

failOnWarnings();

const insert = (session: Session, name: string) => session('items').insert({ name });
const refused = expect.objectContaining({ code: 'ERR_TRANSACTION_CONTROL' });

/** Runs the statement between two inserts, swallowing its error; then a success. */
async function swallow(bench: Bench, run: (session: Session) => PromiseLike<unknown>): Promise<{ status: number; errors: unknown[] }> {
  const errors: unknown[] = [];
  const { status } = await bench.answer(async (req, res) => {
    for (const work of [(session: Session) => insert(session, 'before'), run, (session: Session) => insert(session, 'after')]) {
      await work(req.session).then(undefined, (error) => errors.push(error));
    }
    res.status(201).end();
  });
  return { status, errors };
}

describe('when a statement would end the transaction of the session (77, hazard 33)', () => {
  const bench = useBench();

  const ways: [string, (session: Session) => PromiseLike<unknown>][] = [
    ['raw', (session) => session.raw('COMMIT')],
    ['raw in lower case, with a semicolon', (session) => session.raw('  rollback ;')],
    ['raw behind a comment', (session) => session.raw('/* by the book */ commit')],
    ['raw behind a comment line', (session) => session.raw('-- by the book\n COMMIT')],
    ['raw behind another statement', (session) => session.raw('select 1; commit')],
    ['raw that begins again behind it', (session) => session.raw('select 1; commit; begin')],
    ['raw with a binding', (session) => session.raw('commit ?', ['x'])],
    ['a fragment as binding of a raw', (session) => session.raw('??', session.raw('commit') as never)],
    ['schema.raw', (session) => session.schema.raw('commit').then(() => {})],
    ['a raw of the root Knex', (session) => bench.knex.raw('commit').transacting(session)],
    ['a stream', (session) => readAll(session.raw('commit').stream())],
    ['a raw in a savepoint', (session) => session.transaction((trx) => trx.raw('commit'))],
    ['a raw with a name', (session) => session.raw('commit').options({ name: 'commit' })],
  ];

  it.each(ways)('refuses it by name before it is sent, and everything after it: %s', async (_way, run) => {
    const { status, errors } = await swallow(bench, run);
    expect(errors).toEqual([refused, refused]);
    expect(status).toBe(500);
    expect(bench.errors).toEqual([refused]);
    expect(bench.proxy.sql().filter((sql) => /commit|rollback/i.test(sql) && !/savepoint/i.test(sql))).toEqual(['ROLLBACK']);
    expect(await bench.stored()).toEqual([]);
  });

  it.each(ways)('refuses it as the first statement: %s', async (_way, run) => {
    const answer = await bench.answer(async (req, res) => {
      await run(req.session);
      res.end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toEqual([refused]);
  });
});

describe('when a statement only looks as if it ended the transaction', () => {
  const bench = useBench();
  beforeAll(() => bench.database.admin.raw('CREATE TABLE commit_log (rollback text, "end" int)'));

  it.each([
    'select * from commit_log',
    'select "end", rollback from commit_log',
    "select 'a; commit'",
    'select $$; commit; $$',
    'select $body$; commit; $body$',
    "select E'it\\'s; commit'",
    'select 1 /* ; commit */',
    'select 1 -- ; commit',
    'select case when true then 1 end; select 2',
    "do $$ begin insert into items (name) values ('do'); end $$",
    "savepoint mine; insert into items (name) values ('gone'); rollback to savepoint mine; release mine",
    'savepoint mine; ROLLBACK WORK TO mine',
    'set transaction read write',
    'show transaction_isolation',
    'select pg_current_xact_id() as transaction',
  ])('runs it: %s', async (sql) => {
    const { status, errors } = await swallow(bench, (session) => session.raw(sql));
    expect(errors).toEqual([]);
    expect(status).toBe(201);
    expect((await bench.stored()).filter((name) => name !== 'do')).toEqual(['before', 'after']);
  });

  it('runs a statement whose bound value looks so', async () => {
    const { status, errors } = await swallow(bench, (session) => insert(session, 'x; COMMIT'));
    expect({ status, errors }).toEqual({ status: 201, errors: [] });
    expect(await bench.stored()).toEqual(['before', 'x; COMMIT', 'after']);
  });
});

describe('when a COMMIT is hidden in code on the server', () => {
  const bench = useBench();
  beforeAll(() =>
    bench.database.admin.raw(
      `CREATE PROCEDURE commits() LANGUAGE plpgsql AS $$ BEGIN INSERT INTO items (name) VALUES ('inside'); COMMIT; END $$`,
    ),
  );

  it.each(['do $$ begin commit; end $$', 'call commits()'])("passes on PostgreSQL's own refusal, and stores nothing: %s", async (sql) => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'before');
      await req.session.raw(sql);
      res.end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: '2D000' }]);
    expect(await bench.stored()).toEqual([]);
  });

  it.each(['do $$ begin commit; end $$', 'call commits()'])(
    'does not run it outside of a transaction as the first statement either: %s',
    async (sql) => {
      const answer = await bench.answer(async (req, res) => {
        await req.session.raw(sql);
        res.end();
      });
      expect(answer.status).toBe(500);
      expect(bench.errors).toMatchObject([{ code: '2D000' }]);
      expect(await bench.stored()).toEqual([]);
    },
  );
});

describe('when the transaction has ended all the same, unseen', () => {
  const bench = useBench();
  // Whatever the text says, the server's word counts: here the wire turns a harmless statement into a COMMIT.
  const harmless = 'show a';
  beforeEach(() =>
    bench.proxy.onFrontend((message) => {
      const start = message.bytes.indexOf(harmless);
      if (start >= 0) message.bytes.write('commit', start);
    }),
  );

  it('says so at once, refuses what comes after it, and answers with the error', async () => {
    const { status, errors } = await swallow(bench, (session) => session.raw(harmless));
    expect(errors).toEqual([refused, refused]);
    expect(status).toBe(500);
    expect(bench.errors).toEqual([refused]);
    expect(bench.proxy.sql().filter((sql) => sql.startsWith('insert'))).toHaveLength(1);
    expect(await bench.stored()).toEqual(['before']);
  });

  it('calls the outcome unknown, not rolled back', async () => {
    let session!: Session;
    await bench.answer(async (req, res) => {
      session = req.session;
      await insert(session, 'before');
      await session.raw(harmless).catch(() => {});
      res.end();
    });
    expect(session.outcome).toBe('unknown');
  });
});

async function readAll(rows: AsyncIterable<unknown>): Promise<void> {
  for await (const _ of rows);
}
