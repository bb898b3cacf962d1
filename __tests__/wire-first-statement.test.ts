import type { Session } from 'express-knex-session';
import { failOnWarnings } from './support/warnings';
import { sent, useBench } from './support/wire';

failOnWarnings();

interface Shape {
  name: string;
  run(session: Session): PromiseLike<unknown>;
  /** What a client of the session sees, and a client of plain Knex. */
  result: unknown;
  wire: string;
}

/** BEGIN and the statement under one Sync: no round trip for BEGIN. */
const grouped = (sql: string) => `P(BEGIN;) B E P(${sql}) B D E S Q(COMMIT;)`;
/** BEGIN by itself, its answer awaited. */
const apart = (rest: string) => `Q(BEGIN;) ${rest} Q(COMMIT;)`;

let names = 0;
const rowsOf = (result: PromiseLike<any>) => result.then(({ rows }) => rows);

const shapes: Shape[] = [
  {
    name: 'a statement with bindings',
    run: (session) => rowsOf(session.raw('select ?::int as n', [1])),
    result: [{ n: 1 }],
    wire: grouped('select $1::int as n'),
  },
  {
    name: 'a statement without bindings',
    run: (session) => rowsOf(session.raw('select 1 as n')),
    result: [{ n: 1 }],
    wire: grouped('select 1 as n'),
  },
  {
    name: 'a statement with a trailing semicolon',
    run: (session) => rowsOf(session.raw('select 1 as n; \n')),
    result: [{ n: 1 }],
    wire: grouped('select 1 as n; \n'),
  },
  {
    name: 'a semicolon in a bound value',
    run: (session) => rowsOf(session.raw('select ?::text as s', ['a; b'])),
    result: [{ s: 'a; b' }],
    wire: grouped('select $1::text as s'),
  },
  {
    name: 'a semicolon in a string, which may be two statements',
    run: (session) => rowsOf(session.raw("select 'a; b' as s")),
    result: [{ s: 'a; b' }],
    wire: apart("Q(select 'a; b' as s)"),
  },
  {
    name: 'several statements in one raw',
    run: (session) => session.raw('select 1 as n; select 2 as n').then((results: any) => results.map(({ rows }: any) => rows)),
    result: [[{ n: 1 }], [{ n: 2 }]],
    wire: apart('Q(select 1 as n; select 2 as n)'),
  },
  {
    name: 'a named prepared statement',
    run: (session) => rowsOf(session.raw('select ?::int as n', [7]).options({ name: `seven${++names}` })),
    result: [{ n: 7 }],
    wire: apart('P(select $1::int as n) B D E S'),
  },
  {
    name: 'a statement that fetches its rows in pages',
    run: (session) => rowsOf(session.raw('select n from generate_series(1, 3) n').options({ rows: 2 })),
    result: [{ n: 1 }, { n: 2 }, { n: 3 }],
    wire: apart('P(select n from generate_series(1, 3) n) B D E H E H S'),
  },
  {
    name: 'rows as arrays',
    run: (session) => rowsOf(session.raw('select 1, 2').options({ rowMode: 'array' })),
    result: [[1, 2]],
    wire: grouped('select 1, 2'),
  },
  {
    name: 'types of its own',
    run: (session) => rowsOf(session.raw('select 1 as n').options({ types: { getTypeParser: () => (text: string) => `<${text}>` } })),
    result: [{ n: '<1>' }],
    wire: grouped('select 1 as n'),
  },
  {
    name: 'a comment only',
    run: (session) => rowsOf(session.raw('-- nothing')),
    result: [],
    wire: grouped('-- nothing'),
  },
  {
    name: 'an INSERT that returns',
    run: (session) => session('items').insert({ name: 'a' }).returning('name'),
    result: [{ name: 'a' }],
    wire: grouped('insert into "items" ("name") values ($1) returning "name"'),
  },
  {
    name: 'an UPDATE of no row',
    run: (session) => session('items').update({ name: 'b' }),
    result: 0,
    wire: grouped('update "items" set "name" = $1'),
  },
  {
    name: 'first()',
    run: (session) => session('items').first(),
    result: undefined,
    wire: grouped('select * from "items" limit $1'),
  },
  {
    name: 'a schema statement',
    run: (session) => session.schema.hasTable('items'),
    result: true,
    wire: grouped('select * from information_schema.tables where table_name = $1 and table_schema = current_schema()'),
  },
  {
    name: 'a schema builder of several statements',
    run: (session) => session.schema.createTable('made', (table) => table.integer('n').index()).then(() => 'made'),
    result: 'made',
    wire: 'P(BEGIN;) B E P(create table "made" ("n" integer)) B D E S Q(create index "made_n_index" on "made" ("n")) Q(COMMIT;)',
  },
  {
    name: 'SET TRANSACTION, which must come before any query',
    run: (session) =>
      session.raw('set transaction isolation level serializable').then(() => rowsOf(session.raw('show transaction_isolation'))),
    result: [{ transaction_isolation: 'serializable' }],
    wire: 'P(BEGIN;) B E P(set transaction isolation level serializable) B D E S Q(show transaction_isolation) Q(COMMIT;)',
  },
  {
    name: 'COPY to the client, which pg ignores',
    run: (session) => session.raw('copy items to stdout').then(({ command }: any) => command),
    result: 'COPY',
    wire: grouped('copy items to stdout'),
  },
  {
    name: 'a stream',
    run: (session) => collect(session.raw('select n from generate_series(1, 3) n').stream({ batchSize: 2 })),
    result: [{ n: 1 }, { n: 2 }, { n: 3 }],
    wire: apart('P(select n from generate_series(1, 3) n) B D H E H E H C S'),
  },
];

async function collect(rows: AsyncIterable<unknown>): Promise<unknown[]> {
  const collected: unknown[] = [];
  for await (const row of rows) collected.push(row);
  return collected;
}

describe('when the first statement of a session is', () => {
  const bench = useBench();
  beforeEach(() => bench.database.admin.raw('DROP TABLE IF EXISTS made'));

  describe.each(shapes)('$name', ({ run, result, wire }) => {
    it('gives what it gives in a transaction of Knex', async () => {
      let ofKnex: unknown;
      const rollback = new Error('the session begins where it began');
      await expect(
        bench.knex.transaction(async (trx) => {
          ofKnex = await run(trx as Session);
          throw rollback;
        }),
      ).rejects.toBe(rollback);

      let ofSession: unknown;
      await bench.answer(async (req, res) => {
        ofSession = await run(req.session);
        res.end();
      });
      expect(bench.errors).toEqual([]);
      expect(ofSession).toEqual(result);
      expect(ofSession).toEqual(ofKnex);
    });

    it('reaches the server inside of the transaction, in the fewest messages', async () => {
      await bench.answer(async (req, res) => {
        await run(req.session);
        res.end();
      });
      expect(sent(bench.proxy)).toBe(wire);
    });
  });

  describe('a savepoint', () => {
    it('begins with it under one Sync', async () => {
      await bench.answer(async (req, res) => {
        await req.session.transaction((trx) => trx('items').insert({ name: 'a' }));
        res.end();
      });
      expect(sent(bench.proxy).replace(/session\d+/g, 'level')).toBe(
        'P(BEGIN;) B E P(SAVEPOINT level;) B D E S P(insert into "items" ("name") values ($1)) B D E S Q(RELEASE SAVEPOINT level;) Q(COMMIT;)',
      );
      expect(await bench.stored()).toEqual(['a']);
    });
  });

  describe('an empty query', () => {
    it('fails as in Knex, and the session stays usable', async () => {
      const answer = await bench.answer(async (req, res) => {
        await expect(req.session.raw('')).rejects.toThrow('The query is empty');
        await req.session('items').insert({ name: 'a' });
        res.end();
      });
      expect(bench.errors).toEqual([]);
      expect(answer.status).toBe(200);
      expect(await bench.stored()).toEqual(['a']);
    });
  });

  describe('COPY from a client that sends nothing', () => {
    it('fails as in Knex, and does not wait for ever', async () => {
      const answer = await bench.answer(
        async (req, res) => {
          await req.session.raw('copy items from stdin');
          res.end();
        },
        { signal: AbortSignal.timeout(2_000) },
      );
      expect(answer.status).toBe(500);
      expect(bench.errors).toMatchObject([{ code: '57014', message: expect.stringContaining('No source stream defined') }]);
    });
  });
});
