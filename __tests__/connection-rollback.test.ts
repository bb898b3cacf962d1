import type { Session } from 'express-knex-session';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { type Bench, type Handler, isSql, spoil, useBench } from './support/wire';
import type { WireMessage } from './support/wire-proxy';

failOnWarnings();

const insert = (session: Session, name: string) => session('items').insert({ name });
/** Never ends in time, and stores what it must not. */
const slow = (session: Session, seconds: number) =>
  session.raw("with slow as materialized (select pg_sleep(?)) insert into items (name) select 'slow' from slow", [seconds]);
const appError = new Error('of the app');

/** The next request has a connection of its own, in no transaction of another, and only its row is stored. */
async function expectCleanNext(bench: Bench, stored: string[] = []): Promise<void> {
  bench.proxy.onFrontend(undefined);
  bench.proxy.onBackend(undefined);
  const next = await bench.answer(async (req, res) => {
    await insert(req.session, 'next');
    res.status(201).end();
  });
  expect(next.status).toBe(201);
  expect(await bench.stored()).toEqual([...stored, 'next']);
  // The server hears of the end of a connection when it comes to it.
  await eventually(async () => {
    const idle = await bench.database.admin('pg_stat_activity').whereRaw("datname = current_database() and state like 'idle in%'");
    expect(idle).toEqual([]);
  });
}

describe.each([
  ['because the server refuses it', (message: WireMessage) => spoil(message), { code: '42601' }],
  ['because the connection breaks', () => 'cut-before' as const, { message: expect.stringContaining('Connection terminated') }],
])('when ROLLBACK fails %s', (_why, disturb, cause) => {
  const bench = useBench();
  beforeEach(() => bench.proxy.onFrontend((message) => (isSql(message, 'ROLLBACK') ? disturb(message) : undefined)));

  async function expectDestroyed(): Promise<void> {
    expect(bench.reported).toMatchObject([cause]);
    expect(poolUsage(bench.knex).used).toBe(0);
    await expectCleanNext(bench);
    expect(bench.proxy.frontend.at(-1)?.connection).not.toBe(bench.proxy.frontend[0]?.connection);
  }

  it("keeps the app's error, reports its own, and destroys the connection (24)", async () => {
    const answer = await bench.answer(async (req) => {
      await insert(req.session, 'a');
      throw appError;
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toEqual([appError]);
    expect(bench.errors[0]).toBe(appError);
    await expectDestroyed();
  });

  it("keeps the error of the app's statement", async () => {
    const answer = await bench.answer(async (req) => {
      await insert(req.session, 'a');
      await insert(req.session, 'bad');
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: '23514' }]);
    await expectDestroyed();
  });

  it("keeps the app's response", async () => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      res.status(409).json('taken');
    });
    expect(answer).toMatchObject({ status: 409, body: '"taken"' });
    expect(bench.errors).toEqual([]);
    await expectDestroyed();
  });
});

describe('when a statement is given up by .timeout()', () => {
  const bench = useBench();
  const giveUp = async (session: Session) => slow(session, 0.6).timeout(50);

  it.each([
    ['the first one', async () => {}],
    ['a later one', (session: Session) => insert(session, 'a')],
  ])('does not wait for it (%s), and destroys its connection', async (_which, precede) => {
    const begun = performance.now();
    const answer = await bench.answer(async (req, res) => {
      await precede(req.session);
      await giveUp(req.session);
      res.end();
    });
    expect(performance.now() - begun).toBeLessThan(550);
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ name: 'KnexTimeoutError' }]);
    expect(poolUsage(bench.knex).used).toBe(0);
    await expectCleanNext(bench);
    expect(new Set(bench.proxy.frontend.map(({ connection }) => connection)).size).toBe(2);
    expect(bench.proxy.sql()).not.toContain('ROLLBACK');
  });

  it.each([
    ['the first one', async () => {}],
    ['a later one', (session: Session) => insert(session, 'a')],
  ])('does not let a success pass that swallows it (%s)', async (_which, precede) => {
    const begun = performance.now();
    const answer = await bench.answer(async (req, res) => {
      await precede(req.session);
      await giveUp(req.session).catch(() => {});
      res.status(201).end();
    });
    expect(performance.now() - begun).toBeLessThan(550);
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: 'ERR_TRANSACTION_ABORTED', cause: { name: 'KnexTimeoutError' } }]);
    await expectCleanNext(bench);
  });

  it('cancels it if asked to, and keeps the connection', async () => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      await slow(req.session, 10).timeout(50, { cancel: true });
      res.end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ name: 'KnexTimeoutError' }]);
    expect(bench.proxy.sql().at(-1)).toBe('ROLLBACK');
    const held = bench.proxy.frontend.at(-1)?.connection;
    await expectCleanNext(bench);
    expect(bench.proxy.frontend.at(-1)?.connection).toBe(held);
  });
});

describe("when a statement takes longer than the driver's query_timeout", () => {
  const bench = useBench((url) => ({ connection: { connectionString: url, query_timeout: 150 } as never }));

  const cases: [string, Handler][] = [
    [
      'the first one, thrown',
      async (req, res) => {
        await slow(req.session, 0.6);
        res.end();
      },
    ],
    [
      'a later one, thrown',
      async (req, res) => {
        await insert(req.session, 'a');
        await slow(req.session, 0.6);
        res.end();
      },
    ],
    [
      'a later one, answered with 409',
      async (req, res) => {
        await insert(req.session, 'a');
        await slow(req.session, 0.6).catch(() => {});
        res.status(409).end();
      },
    ],
    [
      'a later one, swallowed',
      async (req, res) => {
        await insert(req.session, 'a');
        await slow(req.session, 0.6).catch(() => {});
        res.status(201).end();
      },
    ],
  ];

  it.each(cases)('stores nothing, and the next request commits nothing of it (hazard 9): %s', async (_which, handler) => {
    const answer = await bench.answer(handler);
    expect(answer.status).toBeGreaterThanOrEqual(400);
    expect(poolUsage(bench.knex).used).toBe(0);
    await expectCleanNext(bench);
  });

  it('tells the handler in time: that is what it is for', async () => {
    let waited = 0;
    await bench.answer(async (req, res) => {
      const begun = performance.now();
      await expect(slow(req.session, 0.6)).rejects.toThrow('Query read timeout');
      waited = performance.now() - begun;
      res.status(409).end();
    });
    expect(waited).toBeLessThan(550);
  });

  it('destroys a connection whose ROLLBACK has taken too long', async () => {
    let released = () => {};
    bench.proxy.onFrontend((message) =>
      isSql(message, 'ROLLBACK')
        ? new Promise<void>((resolve) => {
            released = resolve;
          })
        : undefined,
    );
    const answer = await bench.answer(async (req) => {
      await insert(req.session, 'a');
      throw appError;
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toEqual([appError]);
    expect(bench.reported).toMatchObject([{ message: 'Query read timeout', cause: appError }]);
    released();
    await expectCleanNext(bench);
  });
});

describe('when the connection is reused', () => {
  const bench = useBench({ pool: { min: 0, max: 1 } });
  const pidOf = async (handler: Handler): Promise<{ pid: number; status: number }> => {
    let pid = 0;
    const { status } = await bench.answer(async (req, res, next) => {
      pid = (await req.session.first(req.session.raw('pg_backend_pid() as pid'))).pid;
      await handler(req, res, next);
    });
    return { pid, status };
  };
  const ends: [string, Handler][] = [
    ['a success', (_req, res) => res.end()],
    ['an error status', (_req, res) => res.sendStatus(404)],
    [
      'a throw',
      () => {
        throw appError;
      },
    ],
    ['a statement that failed', async (req) => insert(req.session, 'bad')],
    [
      'a statement that failed, swallowed',
      async (req, res) => {
        await insert(req.session, 'bad').catch(() => {});
        res.end();
      },
    ],
    [
      'setRollbackOnly()',
      (req, res) => {
        req.session.setRollbackOnly();
        res.end();
      },
    ],
    [
      'a savepoint left open',
      async (req, res) => {
        await req.session.transaction();
        res.end();
      },
    ],
    [
      'a stream that was left half read',
      async (req, res) => {
        for await (const _ of req.session.raw('select generate_series(1, 10000)').stream()) break;
        res.end();
      },
    ],
    [
      'commit() by hand',
      async (req, res) => {
        await req.session.commit();
        res.end();
      },
    ],
    [
      'rollback() by hand',
      async (req, res) => {
        await req.session.rollback();
        res.end();
      },
    ],
  ];

  it.each(ends)('is idle and in no transaction after %s', async (_end, handler) => {
    const first = await pidOf(handler);
    await eventually(async () => {
      const [row] = await bench.database.admin('pg_stat_activity').where({ pid: first.pid }).select('state');
      expect(row).toEqual({ state: 'idle' });
    });
    expect((await pidOf((_req, res) => res.end())).pid).toBe(first.pid);
  });
});
