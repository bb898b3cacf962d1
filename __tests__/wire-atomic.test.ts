import { SessionUnavailableError, withSession } from 'express-knex-session';
import type { Client } from 'pg';
import { failOnWarnings } from './support/warnings';
import { atRest, isSql, spoil, useBench } from './support/wire';

failOnWarnings();

describe('when the server cancels whatever runs, again and again', () => {
  const bench = useBench();

  it('never runs a statement outside of its transaction: 0 rows after 1,000 groups that roll back', async () => {
    const groups = 1_000;
    const url = `${bench.database.url}?application_name=target`;
    const knex = bench.database.knex({ connection: url, pool: { min: 0, max: 8 }, log: { warn() {}, error() {} } });
    await bench.database.admin.raw('CREATE TABLE calm ()');
    const storm = bench.database.admin
      .raw(`
        DO $$ BEGIN
          WHILE NOT EXISTS (SELECT FROM calm) LOOP
            PERFORM pg_stat_clear_snapshot();
            PERFORM pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'target';
          END LOOP;
        END $$`)
      .then(() => {});

    const ends: Record<string, number> = {};
    let left = groups;
    const worker = async () => {
      while (left-- > 0) {
        const work = withSession(knex, async (session) => {
          await session('items').insert({ name: `${left}` });
          throw Object.assign(new Error('This group rolls back.'), { code: 'rolled back' });
        });
        const { code } = await work.catch((error) => error);
        ends[code] = (ends[code] ?? 0) + 1;
      }
    };
    try {
      await Promise.all(Array.from({ length: 8 }, worker));
    } finally {
      await bench.database.admin.raw('INSERT INTO calm DEFAULT VALUES');
      await storm;
    }

    expect(await bench.stored()).toEqual([]);
    // Cancelled in BEGIN, in the statement, and not at all: a storm that misses shows nothing.
    expect(ends).toEqual({ 57014: expect.any(Number), ERR_SESSION_UNAVAILABLE: expect.any(Number), 'rolled back': expect.any(Number) });
    expect(Object.values(ends).reduce((sum, n) => sum + n)).toBe(groups);
    await atRest(knex);
  });
});

describe('when BEGIN fails', () => {
  const bench = useBench();
  const failAtBegin = () =>
    bench.proxy.onFrontend((message) => {
      if (isSql(message, 'BEGIN;')) spoil(message);
    });

  describe.each([
    ['that shares its Sync', 'insert into items (name) values (?)', ['a']],
    ['that must wait for it', "insert into items (name) values ('a'); insert into items (name) values ('b')", []],
  ])('and a statement %s', (_kind, sql, bindings) => {
    it('never runs the statement: 503 with the cause, and the connection is destroyed (4)', async () => {
      let pid: unknown;
      await bench.answer(async (req, res) => {
        pid = (await req.session.first(req.session.raw('pg_backend_pid() as pid'))).pid;
        res.end();
      });
      failAtBegin();
      bench.proxy.reset();
      const answer = await bench.answer(async (req, res) => {
        await req.session.raw(sql, bindings);
        res.end();
      });

      expect(answer.status).toBe(503);
      expect(bench.errors).toMatchObject([{ code: 'ERR_SESSION_UNAVAILABLE', cause: { code: '42601' } }]);
      expect(bench.errors[0]).toBeInstanceOf(SessionUnavailableError);
      expect(await bench.stored()).toEqual([]);
      expect(bench.proxy.sql()).not.toContain('COMMIT;');

      bench.proxy.onFrontend(undefined);
      await bench.answer(async (req, res) => res.json(await req.session.first(req.session.raw('pg_backend_pid() as pid'))));
      const alive = await bench.database.admin('pg_stat_activity').where({ pid }).pluck('pid');
      expect(alive).toEqual([]);
    });
  });

  it('runs no stream either', async () => {
    failAtBegin();
    const answer = await bench.answer(async (req, res) => {
      for await (const row of req.session('items').stream()) res.write(JSON.stringify(row));
      res.end();
    });
    expect(answer.status).toBe(503);
    expect(bench.errors).toMatchObject([{ code: 'ERR_SESSION_UNAVAILABLE', cause: { code: '42601' } }]);
  });

  it('tells every statement that was issued with the first, and sends none of them', async () => {
    failAtBegin();
    let results: PromiseSettledResult<unknown>[] = [];
    const answer = await bench.answer(async (req, res) => {
      results = await Promise.allSettled(['a', 'b', 'c'].map((name) => req.session('items').insert({ name })));
      res.end();
    });
    expect(results.map((result) => (result as PromiseRejectedResult).reason.code)).toEqual(Array(3).fill('ERR_SESSION_UNAVAILABLE'));
    expect(answer.status).toBe(503);
    expect(bench.proxy.sql().filter((sql) => sql.startsWith('insert'))).toHaveLength(1);
    expect(await bench.stored()).toEqual([]);
  });

  it('stores nothing of 120 groups whose every BEGIN fails', async () => {
    failAtBegin();
    let refused = 0;
    for (let i = 0; i < 120; i += 4) {
      await Promise.all(
        Array.from({ length: 4 }, (_, j) =>
          withSession(bench.knex, (session) => session('items').insert({ name: `${i + j}` })).catch((error) => {
            if (error instanceof SessionUnavailableError) refused++;
          }),
        ),
      );
    }
    expect(refused).toBe(120);
    expect(await bench.stored()).toEqual([]);
  });
});

describe('when the first statement itself fails', () => {
  const bench = useBench();

  it('rolls back, passes the error on, and keeps the connection', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'bad' });
      res.end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: '23514' }]);
    expect(bench.proxy.sql().at(-1)).toBe('ROLLBACK');

    await bench.answer(async (req, res) => res.json(await req.session('items')));
    expect(new Set(bench.proxy.frontend.map(({ connection }) => connection)).size).toBe(1);
  });

  it('fails at Parse as at Execute: the transaction has begun, and is rolled back', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('nowhere').insert({ name: 'a' });
      res.end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: '42P01' }]);
    expect(bench.proxy.sql().at(-1)).toBe('ROLLBACK');
  });

  it('answers 500 with the cause if the error is swallowed (20)', async () => {
    let swallowed: unknown;
    const answer = await bench.answer(async (req, res) => {
      await req
        .session('items')
        .insert({ name: 'bad' })
        .catch((error) => {
          swallowed = error;
        });
      res.status(201).end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: 'ERR_TRANSACTION_ABORTED' }]);
    expect(bench.errors[0].cause).toBe(swallowed);
  });

  describe('because a value cannot be sent', () => {
    const unsendable = {
      toPostgres(): never {
        throw new Error('not today');
      },
    };
    const insertUnsendable = (session: import('express-knex-session').Session) =>
      session.raw('insert into items (name) values (?), (?)', ['a', unsendable]);

    it('rolls back', async () => {
      const answer = await bench.answer(async (req, res) => {
        await insertUnsendable(req.session);
        res.end();
      });
      expect(answer.status).toBe(500);
      expect(bench.errors[0].message).toContain('not today');
      expect(bench.proxy.sql()).not.toContain('COMMIT;');
    });

    it('leaves the session usable, in its transaction', async () => {
      const answer = await bench.answer(async (req, res) => {
        await expect(insertUnsendable(req.session)).rejects.toThrow('not today');
        expect(req.session.outcome).toBe('open');
        await req.session('items').insert({ name: 'b' });
        res.status(201).end();
      });
      expect(answer.status).toBe(201);
      expect(await bench.stored()).toEqual(['b']);
      expect(bench.proxy.sql().filter((sql) => sql === 'BEGIN;')).toHaveLength(1);
    });

    it('leaves the statements that were issued with it alone', async () => {
      const answer = await bench.answer(async (req, res) => {
        const [failed] = await Promise.allSettled([
          insertUnsendable(req.session),
          ...['b', 'c'].map((name) => req.session('items').insert({ name })),
        ]);
        expect(failed.status).toBe('rejected');
        res.status(201).end();
      });
      expect(answer.status).toBe(201);
      expect(await bench.stored()).toEqual(['b', 'c']);
    });

    it('stores nothing of it if the handler answers with an error status', async () => {
      await bench.answer(async (req, res) => {
        await insertUnsendable(req.session).catch(() => {});
        await req.session('items').insert({ name: 'b' });
        res.status(400).end();
      });
      expect(await bench.stored()).toEqual([]);
    });
  });
});

describe("when something wraps the driver's query() and sends a copy of the first statement, which pg sends without BEGIN", () => {
  const bench = useBench();

  /** With a text of its own, as tracers do that put a comment into it. */
  const copying = (name?: unknown) => {
    const afterCreate = (connection: Client, done: (error?: Error) => void): void => {
      const query = connection.query as (...args: unknown[]) => unknown;
      connection.query = ((given: { text?: string; name?: unknown }, ...others: unknown[]) =>
        query.call(
          connection,
          given.text && given.name === name ? { ...given, text: `${given.text} /* traced */` } : given,
          ...others,
        )) as never;
      done();
    };
    return bench.database.knex({ pool: { min: 0, max: 1, afterCreate } });
  };

  it('is not asked to by one that leaves named statements alone', async () => {
    const work = withSession(copying(undefined), async (session) => {
      await session('items').insert({ name: 'a' });
      throw new Error('mine');
    });
    await expect(work).rejects.toThrow('mine');
    expect(await bench.stored()).toEqual([]);
  });

  it('says so, and commits nothing more', async () => {
    const knex = copying('');
    const work = withSession(knex, async (session) => {
      await session('items').insert({ name: 'a' });
    });
    await expect(work).rejects.toMatchObject({ code: 'ERR_TRANSACTION_CONTROL', message: expect.stringContaining('without its BEGIN') });
    const swallowing = withSession(knex, async (session) => {
      await session('items')
        .insert({ name: 'b' })
        .catch(() => {});
      await session('items').insert({ name: 'c' });
    });
    await expect(swallowing).rejects.toMatchObject({ code: 'ERR_TRANSACTION_CONTROL' });
    // What was sent has committed by itself.
    expect(await bench.stored()).toEqual(['a', 'b']);
    await atRest(knex);
  });
});
