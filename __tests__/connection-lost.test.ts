import { type Session, withSession } from 'express-knex-session';
import createKnex from 'knex';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { type Bench, ended, type Handler, isSql, useBench } from './support/wire';

failOnWarnings();

const insert = (session: Session, name: string) => session('items').insert({ name });

/** Whatever happened to the connection: nothing is stored, it is not in the pool any more, and the next request works. */
async function expectRolledBack(bench: Bench): Promise<void> {
  expect(poolUsage(bench.knex)).toMatchObject({ used: 0, pendingAcquires: 0 });
  expect(bench.proxy.sql()).not.toContain('COMMIT;');
  bench.proxy.onFrontend(undefined);
  bench.proxy.onBackend(undefined);
  await eventually(async () => expect(await bench.stored()).toEqual([]));
  bench.proxy.reset();
  const next = await bench.answer(async (req, res) => {
    await insert(req.session, 'next');
    res.status(201).end();
  });
  expect(next.status).toBe(201);
  expect(await bench.stored()).toEqual(['next']);
}

const terminated = expect.stringMatching(/^(.* - )?Connection terminated unexpectedly$/);

describe.each([
  ['the backend is killed', (bench: Bench) => bench.kill(), { code: '57P01' }],
  ['the network breaks', (bench: Bench) => bench.cut(), { message: terminated }],
])('when %s between two statements', (_what, lose, error) => {
  const bench = useBench();

  it('fails the next statement with what the driver said, and never calls it unknown (21)', async () => {
    let session!: Session;
    const answer = await bench.answer(async (req, res) => {
      session = req.session;
      await insert(session, 'a');
      await lose(bench);
      await insert(session, 'b');
      res.status(201).end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([error]);
    expect(session.outcome).toBe('rolled back');
    await expectRolledBack(bench);
  });

  it('fails the request before COMMIT is sent (21)', async () => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      await lose(bench);
      res.status(201).end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([error]);
    await expectRolledBack(bench);
  });

  it('does not let a success pass that swallows the error of the next statement', async () => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      await lose(bench);
      await insert(req.session, 'b').catch(() => {});
      res.status(201).end();
    });
    expect(answer.status).toBe(500);
    await expectRolledBack(bench);
  });

  it("leaves the handler's own error status alone, and reports nothing: there is nothing to roll back", async () => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      await lose(bench);
      res.status(409).json('taken');
    });
    expect(answer).toMatchObject({ status: 409, body: '"taken"' });
    expect(bench.errors).toEqual([]);
    expect(bench.reported).toEqual([]);
    await expectRolledBack(bench);
  });

  it('rejects commit() by hand with what the driver said', async () => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      await lose(bench);
      await expect(req.session.commit()).rejects.toMatchObject(error);
      expect(req.session.outcome).toBe('rolled back');
      res.status(503).end();
    });
    expect(answer.status).toBe(503);
    await expectRolledBack(bench);
  });

  it('ends a savepoint and its session', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session.transaction(async (trx) => {
        await insert(trx as Session, 'a');
        await lose(bench);
        await insert(trx as Session, 'b');
      });
      res.status(201).end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([error]);
    await expectRolledBack(bench);
  });
});

describe.each([
  ['the backend is killed', { code: '57P01' }, (bench: Bench) => bench.kill()],
  ['the network breaks', { message: terminated }, (bench: Bench) => bench.cut()],
])('when %s during a statement', (_what, error, lose) => {
  const bench = useBench();
  /** Loses the connection as soon as the server works on pg_sleep. */
  const loseInSleep = () =>
    eventually(async () => {
      expect(
        await bench.database.admin('pg_stat_activity').where({ wait_event: 'PgSleep' }).whereRaw('datname = current_database()'),
      ).toHaveLength(1);
      await lose(bench);
    });
  const slow = (session: Session) => session.raw('select pg_sleep(20)');

  async function losesIn(handler: Handler, status: number): Promise<void> {
    const [answer] = await Promise.all([bench.answer(handler), loseInSleep()]);
    expect(answer.status).toBe(status);
  }

  it('passes the error on and stores nothing', async () => {
    await losesIn(async (req, res) => {
      await insert(req.session, 'a');
      await slow(req.session);
      res.status(201).end();
    }, 500);
    expect(bench.errors).toMatchObject([error]);
    await expectRolledBack(bench);
  });

  it('stores nothing of it if it is the first one, and calls it a failure whatever it knows of BEGIN', async () => {
    const [answer] = await Promise.all([
      bench.answer(async (req, res) => {
        await slow(req.session);
        res.status(201).end();
      }),
      loseInSleep(),
    ]);
    // 503 if the answer to BEGIN was not on its way yet.
    expect([500, 503]).toContain(answer.status);
    expect(bench.errors[0].cause ?? bench.errors[0]).toMatchObject(error);
    await expectRolledBack(bench);
  });

  it('fails all statements that wait behind it, at once', async () => {
    let results: PromiseSettledResult<unknown>[] = [];
    await losesIn(async (req, res) => {
      await insert(req.session, 'a');
      results = await Promise.allSettled([slow(req.session), insert(req.session, 'b'), insert(req.session, 'c')]);
      res.status(201).end();
    }, 500);
    expect(results.map(({ status }) => status)).toEqual(Array(3).fill('rejected'));
    await expectRolledBack(bench);
  });

  it('breaks a stream that is being read', async () => {
    await losesIn(async (req, res) => {
      await insert(req.session, 'a');
      let rows = 0;
      for await (const _ of req.session.raw('select pg_sleep(n) from generate_series(0, 20, 20) n').stream({ batchSize: 1 })) rows++;
      res.json(rows);
    }, 500);
    // The driver's stream keeps the server's last words for itself.
    expect(bench.errors).toEqual([expect.any(Error)]);
    await expectRolledBack(bench);
  });
});

describe('when a stream that nobody reads loses its connection', () => {
  const bench = useBench();

  // Without a listener for 'error' an error event would be an uncaught exception, and the process would die.
  it('fails the request and nothing else', async () => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      req.session.raw('select generate_series(1, 100000)').stream();
      await eventually(() => expect(bench.proxy.sql().at(-1)).toContain('generate_series'));
      await bench.kill();
      res.status(201).end();
    });
    expect(answer.status).toBe(500);
    await expectRolledBack(bench);
  });
});

describe('when the server ends a transaction that takes too long', () => {
  const bench = useBench((url) => ({ connection: `${url}?options=-c%20idle_in_transaction_session_timeout%3D50` }));

  it.each([
    ['before its next statement', (session: Session) => insert(session, 'b').then(() => {})],
    ['before its end', async () => {}],
  ])('answers 500 with what the server said, %s', async (_when, work) => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      await ended(bench.held());
      await work(req.session);
      res.status(201).end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: '25P03' }]);
    await expectRolledBack(bench);
  });
});

describe('when the server ends a statement that takes too long', () => {
  const bench = useBench((url) => ({ connection: `${url}?options=-c%20statement_timeout%3D50` }));

  it('rolls back, and keeps the connection', async () => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      await req.session.raw('select pg_sleep(10)');
      res.status(201).end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: '57014' }]);
    expect(bench.proxy.sql().at(-1)).toBe('ROLLBACK');
    expect(poolUsage(bench.knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 });
  });
});

describe('when an idle connection of the pool has died', () => {
  const bench = useBench();

  it('is not noticed by the session if the pool knows', async () => {
    const { free } = bench.knex.client.pool as { free: { resource: import('pg').Client }[] };
    const idle = free[0]?.resource as import('pg').Client;
    const known = ended(idle);
    await bench.terminate(idle);
    await known;
    await expectRolledBack(bench);
  });

  it('answers 503 with the cause if the pool does not know yet: nothing was run', async () => {
    bench.proxy.onFrontend((message) => (isSql(message, 'BEGIN;') ? 'cut-before' : undefined));
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      res.status(201).end();
    });
    expect(answer.status).toBe(503);
    expect(bench.errors).toMatchObject([{ code: 'ERR_SESSION_UNAVAILABLE', cause: { message: terminated } }]);
    await expectRolledBack(bench);
  });

  it('answers 503 if the network breaks in the answer to BEGIN', async () => {
    bench.proxy.onBackend((message) => (message.text === 'BEGIN' ? 'cut-before' : undefined));
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      res.status(201).end();
    });
    expect(answer.status).toBe(503);
    await expectRolledBack(bench);
  });
});

describe('when there is no database', () => {
  it('rejects by name with the cause', async () => {
    const knex = createKnex({
      client: 'pg',
      connection: 'postgres://nobody@127.0.0.1:1/nowhere',
      log: { warn() {}, error() {} },
    });
    const work = withSession(knex, (session) => insert(session, 'a'));
    await expect(work).rejects.toMatchObject({ code: 'ERR_SESSION_UNAVAILABLE', status: 503, cause: { code: 'ECONNREFUSED' } });
    await knex.destroy();
  });
});
