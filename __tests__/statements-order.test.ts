import type { Session } from 'express-knex-session';
import { failOnWarnings } from './support/warnings';
import { useBench } from './support/wire';

// pg warns from the third query on that waits in its own queue: its next major version has none.
failOnWarnings();

const ten = Array.from({ length: 10 }, (_, i) => `${i}`);
const readAll = async (rows: AsyncIterable<unknown>) => {
  for await (const _ of rows);
};
const insert = (session: Session, name: string) => session('items').insert({ name });

describe('when statements of one request are issued together', () => {
  const bench = useBench();
  /** The statements on the wire, with what each inserts; savepoints by their depth. */
  const statements = () =>
    bench.proxy.sql().map((sql) =>
      sql
        .replace(/^insert.*values \('?([^')]*)'?\)$/i, '$1')
        .replace(/session\d+/g, '')
        .replace(/;$/, '')
        .trim(),
    );
  /** An insert whose name can be seen on the wire. */
  const named = (session: Session, name: string) => session.raw(`insert into items (name) values ('${name}')`);

  it('runs ten in their order on one connection, with one BEGIN (5)', async () => {
    const answer = await bench.answer(async (req, res) => {
      await Promise.all(ten.map((name) => insert(req.session, name)));
      res.status(201).end();
    });
    expect(answer.status).toBe(201);
    expect(await bench.stored()).toEqual(ten);
    expect(bench.proxy.sql().filter((sql) => sql === 'BEGIN;')).toHaveLength(1);
    expect(new Set(bench.proxy.frontend.map(({ connection }) => connection)).size).toBe(1);
  });

  it('runs ten in their order after others', async () => {
    await bench.answer(async (req, res) => {
      await insert(req.session, 'first');
      await Promise.all(ten.map((name) => insert(req.session, name)));
      res.end();
    });
    expect(await bench.stored()).toEqual(['first', ...ten]);
  });

  it('runs what three services issue, each in its own order', async () => {
    await bench.answer(async (req, res) => {
      const service = (name: string) => Promise.all([1, 2, 3].map((n) => insert(req.session, `${name}${n}`)));
      await Promise.all(['a', 'b', 'c'].map(service));
      res.end();
    });
    expect(await bench.stored()).toEqual(['a1', 'a2', 'a3', 'b1', 'b2', 'b3', 'c1', 'c2', 'c3']);
  });

  it('lets a middleware and the handler share one transaction (6)', async () => {
    await bench.answer(async (req, res) => {
      const fromMiddleware = insert(req.session, 'middleware').then(() => {});
      await insert(req.session, 'handler');
      await fromMiddleware;
      res.end();
    });
    expect(await bench.stored()).toEqual(['middleware', 'handler']);
    expect(bench.proxy.sql().filter((sql) => sql === 'BEGIN;')).toHaveLength(1);
  });

  it('waits with a statement until a stream before it has been read', async () => {
    const answer = await bench.answer(async (req, res) => {
      const rows = req.session.raw('select n from generate_series(1, 500) n').stream({ batchSize: 10 });
      const inserted = insert(req.session, 'a').then(() => {});
      let count = 0;
      for await (const _ of rows) count++;
      await inserted;
      res.json(count);
    });
    expect(answer.body).toBe('500');
    expect(await bench.stored()).toEqual(['a']);
  });

  it('runs a statement for each row of a stream, as Knex does: the driver has read all 100', async () => {
    const answer = await bench.answer(async (req, res) => {
      for await (const { n } of req.session.raw('select n from generate_series(1, 100) n').stream()) await insert(req.session, `${n}`);
      res.status(201).end();
    });
    expect(answer.status).toBe(201);
    expect(await bench.stored()).toHaveLength(100);
  });

  it('keeps the order of kinds mixed: stream, raw, builder, savepoint', async () => {
    await bench.answer(async (req, res) => {
      const { session } = req;
      await named(session, 'first');
      await Promise.all([
        readAll(session.raw("insert into items (name) values ('stream')").stream()),
        named(session, 'raw'),
        insert(session, 'builder'),
        session.transaction((trx) => named(trx as Session, 'inside')),
        named(session, 'last'),
      ]);
      res.end();
    });
    // What was issued before the savepoint is not in it; what came after it may be.
    expect(statements().slice(0, 5)).toEqual(['BEGIN', 'first', 'stream', 'raw', '$1']);
    expect(statements().filter((sql) => sql !== 'last')).toEqual([
      ...['BEGIN', 'first', 'stream', 'raw', '$1', 'SAVEPOINT', 'inside', 'RELEASE SAVEPOINT', 'COMMIT'],
    ]);
    expect(await bench.stored()).toEqual(expect.arrayContaining(['first', 'stream', 'raw', 'builder', 'inside', 'last']));
  });

  it('runs savepoints one after the other, and loses none (47)', async () => {
    await bench.answer(async (req, res) => {
      await Promise.all(
        ['a', 'b', 'c'].map((name) =>
          req.session
            .transaction(async (trx) => {
              await named(trx as Session, `${name}1`);
              await named(trx as Session, `${name}2`);
              if (name === 'b') throw new Error('only this one');
            })
            .catch(() => {}),
        ),
      );
      res.end();
    });
    expect(await bench.stored()).toEqual(['a1', 'a2', 'c1', 'c2']);
  });

  it('runs statements together inside of a savepoint', async () => {
    await bench.answer(async (req, res) => {
      await req.session.transaction((trx) => Promise.all(ten.map((name) => named(trx as Session, name))));
      res.end();
    });
    expect(statements()).toEqual(['BEGIN', 'SAVEPOINT', ...ten, 'RELEASE SAVEPOINT', 'COMMIT']);
  });

  describe('next to a savepoint that is rolled back (hazard 6)', () => {
    /** Runs work of the session while a savepoint is open that will be rolled back. */
    const beside = (work: (session: Session) => PromiseLike<unknown>) =>
      bench.answer(async (req, res) => {
        const { session } = req;
        await named(session, 'before');
        const savepoint = session
          .transaction(async (trx) => {
            await named(trx as Session, 'inside');
            throw new Error('rolled back to');
          })
          .catch(() => {});
        await Promise.all([savepoint, work(session)]);
        res.end();
      });

    it.each([
      ['an INSERT', (session: Session) => named(session, 'beside')],
      [
        'an INSERT in the clothes of a SELECT',
        (session: Session) => session.raw("with made as (insert into items (name) values ('beside') returning 1) select * from made"),
      ],
      ['an INSERT in a stream', (session: Session) => readAll(session.raw("insert into items (name) values ('beside')").stream())],
    ])('is kept or named, never lost in silence: %s', async (_what, work) => {
      const answer = await beside(work);
      if (answer.status === 200) expect(await bench.stored()).toEqual(['before', 'beside']);
      else expect(bench.errors).toMatchObject([{ code: expect.stringMatching(/^ERR_/) }]);
    });

    it.each([
      ['a SELECT', (session: Session) => session('items').select()],
      ['a SELECT by raw', (session: Session) => session.raw('select 1')],
      ['a SELECT in a stream', (session: Session) => readAll(session('items').stream())],
      ['another savepoint', (session: Session) => session.transaction((trx) => named(trx as Session, 'beside'))],
    ])('does no harm: %s', async (_what, work) => {
      const answer = await beside(work);
      expect(bench.errors).toEqual([]);
      expect(answer.status).toBe(200);
      expect((await bench.stored()).filter((name) => name !== 'beside')).toEqual(['before']);
    });
  });

  it('goes on after one that fails, as PostgreSQL does: the later ones fail too, and say why', async () => {
    let results: PromiseSettledResult<unknown>[] = [];
    const answer = await bench.answer(async (req, res) => {
      results = await Promise.allSettled(['a', 'bad', 'c', 'd'].map((name) => insert(req.session, name)));
      res.end();
    });
    const [, bad, ...later] = results.map((result) => (result.status === 'rejected' ? result.reason : undefined));
    expect(bad).toMatchObject({ code: '23514' });
    expect(later).toMatchObject([{ code: '25P02' }, { code: '25P02' }]);
    for (const error of later) expect(error.cause).toBe(bad);
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: 'ERR_TRANSACTION_ABORTED', cause: bad }]);
    expect(await bench.stored()).toEqual([]);
  });

  it('rolls back if one fails in Promise.all, after the others have been let through', async () => {
    const answer = await bench.answer(async (req, res) => {
      await Promise.all(['a', 'bad', 'c', 'd'].map((name) => insert(req.session, name)));
      res.end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: '23514' }]);
    expect(bench.proxy.sql().at(-1)).toBe('ROLLBACK');
    expect(await bench.stored()).toEqual([]);
  });
});

describe('when many requests at once issue several statements each', () => {
  const bench = useBench({ pool: { min: 0, max: 3 } });

  it('gives each its own transaction and connection (36)', async () => {
    const url = bench.route(async (req, res) => {
      const { txid } = await req.session.first(req.session.raw('pg_current_xact_id()::text as txid'));
      const others = await Promise.all([1, 2, 3].map(() => req.session.first(req.session.raw('pg_current_xact_id()::text as txid'))));
      for (const other of others) expect(other.txid).toBe(txid);
      res.send(txid);
    });
    const answers = await Promise.all(Array.from({ length: 30 }, () => fetch(url)));
    const ids = await Promise.all(answers.map((answer) => answer.text()));
    expect(bench.errors).toEqual([]);
    expect(new Set(ids).size).toBe(30);
  });
});
