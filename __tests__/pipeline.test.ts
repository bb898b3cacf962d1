import { SessionUnavailableError, withSession } from 'express-knex-session';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { atRest, isSql, sent, spoil, useBench } from './support/wire';

failOnWarnings();

const PIPELINED = { pipeline: true } as never;
const names = Array.from({ length: 10 }, (_, i) => `${i}`);

describe("when statements are issued together on connections in pg's pipeline mode", () => {
  const bench = useBench((url) => ({ connection: { connectionString: url, ...(PIPELINED as object) } as never }));

  it('takes two round trips: BEGIN with all of them, and COMMIT', async () => {
    // Not by luck: the server has all of them before its first answer.
    const syncsBeforeAnswer: number[] = [];
    bench.proxy.onBackend(({ type }) => {
      if (type === 'Z') syncsBeforeAnswer.push(bench.proxy.frontend.filter((message) => message.type === 'S').length);
    });
    await bench.answer(async (req, res) => {
      await Promise.all(names.map((name) => req.session('items').insert({ name })));
      res.end();
    });
    expect(bench.proxy.roundTrips()).toBe(2);
    expect(syncsBeforeAnswer[0]).toBe(10);
    expect(await bench.stored()).toEqual(names);
  });

  it('sends them in the order in which they were issued, whatever they are', async () => {
    let results: unknown[] = [];
    await bench.answer(async (req, res) => {
      const { session } = req;
      results = await Promise.all([
        session('items').insert({ name: 'a' }).returning('name'),
        session('items').count('* as n').first(),
        session.raw("insert into items (name) values ('b'); insert into items (name) values ('c')"),
        session('items').count('* as n').first(),
        session('items').where({ name: 'a' }).delete(),
        session('items').pluck('name'),
      ]);
      res.end();
    });
    expect(results).toEqual([[{ name: 'a' }], { n: '1' }, expect.any(Array), { n: '3' }, 1, ['b', 'c']]);
    expect(await bench.stored()).toEqual(['b', 'c']);
  });

  it('asks for the portal of BEGIN with those that follow before its answer, and not after', async () => {
    await bench.answer(async (req, res) => {
      await Promise.all([req.session('items').insert({ name: 'a' }), req.session('items').insert({ name: 'b' })]);
      await req.session('items').insert({ name: 'c' });
      res.end();
    });
    const insert = 'P(insert into "items" ("name") values ($1)) B D E S';
    expect(sent(bench.proxy)).toBe(`P(BEGIN;) B E ${insert} D ${insert} ${insert} Q(COMMIT;)`);
  });

  it('begins once if the first cannot share its Sync', async () => {
    await bench.answer(async (req, res) => {
      await Promise.all([
        req.session.raw("insert into items (name) values ('a'); insert into items (name) values ('b')"),
        ...names.map((name) => req.session('items').insert({ name })),
      ]);
      res.end();
    });
    expect(bench.proxy.sql().filter((sql) => sql === 'BEGIN;')).toHaveLength(1);
    expect(await bench.stored()).toEqual(['a', 'b', ...names]);
  });

  it('begins with the next one if the driver refuses the first', async () => {
    let results: PromiseSettledResult<unknown>[] = [];
    const answer = await bench.answer(async (req, res) => {
      const impossible = new (class {
        toPostgres(): never {
          throw new Error('impossible');
        }
      })();
      results = await Promise.allSettled([
        req.session('items').insert({ name: impossible }),
        ...names.map((name) => req.session('items').insert({ name })),
      ]);
      res.end();
    });
    expect(results.map(({ status }) => status)).toEqual(['rejected', ...names.map(() => 'fulfilled')]);
    expect([answer.status, await bench.stored()]).toEqual([200, names]);
  });

  it('fails all that follow an error, with the error as cause, and rolls back', async () => {
    let results: PromiseSettledResult<unknown>[] = [];
    const answer = await bench.answer(async (req, res) => {
      results = await Promise.allSettled(['a', 'bad', 'b', 'c'].map((name) => req.session('items').insert({ name })));
      res.end();
    });
    const reasons = results.slice(1).map((result) => (result as PromiseRejectedResult).reason);
    expect(results[0]?.status).toBe('fulfilled');
    expect(reasons.map(({ code }) => code)).toEqual(['23514', '25P02', '25P02']);
    expect(reasons.slice(1).map(({ cause }) => cause)).toEqual([reasons[0], reasons[0]]);
    expect([answer.status, await bench.stored()]).toEqual([500, []]);
    expect(poolUsage(bench.knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 });
  });

  it('keeps savepoints apart from what runs beside them', async () => {
    const answer = await bench.answer(async (req, res) => {
      const { session } = req;
      await Promise.all(['a', 'b'].map((name) => session('items').insert({ name })));
      await Promise.all([
        session.transaction((nested) => Promise.all(['c', 'd'].map((name) => nested('items').insert({ name })))),
        session
          .transaction((nested) =>
            Promise.allSettled(['e', 'bad', 'f'].map((name) => nested('items').insert({ name }))).then(() => nested.rollback()),
          )
          .catch(() => {}),
        session.transaction((nested) => Promise.all(['g', 'h'].map((name) => nested('items').insert({ name })))),
      ]);
      await Promise.all(['i', 'j'].map((name) => session('items').insert({ name })));
      res.end();
    });
    expect([answer.status, await bench.stored()]).toEqual([200, ['a', 'b', 'c', 'd', 'g', 'h', 'i', 'j']]);
  });

  it('commits those that were not awaited', async () => {
    await bench.answer((req, res) => {
      for (const name of names) void req.session('items').insert({ name }).then();
      res.end();
    });
    expect(await bench.stored()).toEqual(names);
  });

  it('makes tables, whose statements are several', async () => {
    const answer = await bench.answer(async (req, res) => {
      await Promise.all([
        req.session.schema.createTable('made', (table) => {
          table.integer('id').primary().comment('key');
          table.text('name').index();
        }),
        req.session('made').insert({ id: 1, name: 'a' }),
        req.session('made').insert({ id: 2, name: 'b' }),
      ]);
      await req.session.schema.dropTable('made');
      res.end();
    });
    expect(answer.status).toBe(200);
  });

  it('refuses a COMMIT of its own among them', async () => {
    const answer = await bench.answer(async (req, res) => {
      await Promise.allSettled([
        req.session('items').insert({ name: 'a' }),
        req.session.raw('COMMIT'),
        req.session('items').insert({ name: 'b' }),
      ]);
      res.end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: 'ERR_TRANSACTION_CONTROL' }]);
    expect(await bench.stored()).toEqual([]);
  });

  it('rolls back if the client leaves while they run', async () => {
    const leaving = new AbortController();
    let results: PromiseSettledResult<unknown>[] = [];
    const handled = new Promise<void>((resolve) => {
      const answer = bench.answer(
        async (req, res) => {
          const running = Promise.allSettled([
            req.session('items').insert({ name: 'a' }),
            req.session.select(req.session.raw('pg_sleep(30)')),
            req.session('items').insert({ name: 'b' }),
          ]);
          setTimeout(() => leaving.abort(), 100);
          results = await running;
          res.end();
          resolve();
        },
        { signal: leaving.signal },
      );
      answer.catch(() => {});
    });
    await handled;
    expect(results.slice(1).map((result) => (result as PromiseRejectedResult).reason.code)).toEqual([
      'ERR_SESSION_CLOSED',
      'ERR_SESSION_CLOSED',
    ]);
    await atRest(bench.knex);
    expect(await bench.stored()).toEqual([]);
  });

  it('sends nothing behind a statement that is being cancelled (hazard 13)', async () => {
    for (let i = 0; i < 10; i++) {
      const answer = await bench.answer(async (req, res) => {
        const slow = req.session.transaction((nested) => nested('items').select(nested.raw('pg_sleep(5)')).timeout(20, { cancel: true }));
        await req.session('items').insert({ name: `before ${i}` });
        await slow.catch(() => {});
        await Promise.all(names.map((name) => req.session('items').insert({ name: `${name} ${i}` })));
        res.end();
      });
      expect([i, answer.status, bench.errors.map(({ message }) => message)]).toEqual([i, 200, []]);
    }
    expect(await bench.stored()).toHaveLength(110);
  });

  it('does not wait for those behind one that Knex has given up', async () => {
    const began = performance.now();
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').select();
      await Promise.allSettled([
        req.session.select(req.session.raw('pg_sleep(3)')).timeout(100),
        ...names.map((name) => req.session('items').insert({ name })),
      ]);
      res.end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: 'ERR_TRANSACTION_ABORTED', cause: { name: 'KnexTimeoutError' } }]);
    expect(performance.now() - began).toBeLessThan(2_500);
    expect(await bench.stored()).toEqual([]);
  });

  it('tells all of them if BEGIN fails, and runs none (hazard 4)', async () => {
    bench.proxy.onFrontend((message) => {
      if (isSql(message, 'BEGIN;')) spoil(message);
    });
    let results: PromiseSettledResult<unknown>[] = [];
    const answer = await bench.answer(async (req, res) => {
      results = await Promise.allSettled(names.map((name) => req.session('items').insert({ name })));
      res.end();
    });
    for (const result of results) expect((result as PromiseRejectedResult).reason).toBeInstanceOf(SessionUnavailableError);
    expect([answer.status, await bench.stored()]).toEqual([503, []]);
  });

  it('survives a connection that is lost under them', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      const running = Promise.allSettled([req.session.select(req.session.raw('pg_sleep(30)')), req.session('items').insert({ name: 'b' })]);
      await bench.kill();
      expect((await running).map(({ status }) => status)).toEqual(['rejected', 'rejected']);
      res.end();
    });
    expect([answer.status, await bench.stored()]).toEqual([500, []]);
  });

  it('never runs one outside of its transaction: 0 rows after 400 groups under a storm of cancels', async () => {
    const groups = 400;
    const connection = { connectionString: `${bench.database.url}?application_name=target`, pipeline: true } as never;
    const knex = bench.database.knex({ connection, pool: { min: 0, max: 8 }, log: { warn() {}, error() {} } });
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
          await Promise.all(['a', 'b', 'c', 'd'].map((name) => session('items').insert({ name: `${name}${left}` })));
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
    expect(ends).toEqual({ 57014: expect.any(Number), ERR_SESSION_UNAVAILABLE: expect.any(Number), 'rolled back': expect.any(Number) });
    await atRest(knex);
  });
});
