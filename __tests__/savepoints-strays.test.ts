import { withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { caught, insert, Ledger, UNCHANGED } from './support/knex';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

// Statements that come to a savepoint too late, or that belong to another level than the one that is open.
failOnWarnings();
const ledger = Ledger.forTests();
const failure = new RangeError('no');

/** Lets other promises go on, some steps. */
const steps = async (count: number) => {
  for (let i = 0; i < count; i++) await null;
};

afterEach(() => expect(poolUsage(ledger.knex)).toMatchObject({ used: 0, pendingAcquires: 0 }));

const ends: [string, (inner: Knex.Transaction) => unknown][] = [
  ['released', (inner) => inner.commit()],
  ['rolled back', (inner) => inner.rollback()],
];

const uses: [string, (inner: Knex.Transaction) => PromiseLike<unknown>][] = [
  ['a statement', (inner) => insert(inner, 'x')],
  [
    'a stream',
    async (inner) => {
      for await (const row of inner('people').stream()) throw new Error(`read ${row}`);
    },
  ],
  ['a savepoint in it', (inner) => inner.transaction(async (deeper) => insert(deeper, 'x'))],
  ['a savepoint as a promise in it', async (inner) => insert(await inner.transaction(), 'x')],
  ['a builder of the root knex', (inner) => ledger.knex('people').insert({ name: 'x' }).transacting(inner)],
];

describe.each(ends)('when a savepoint has been %s', (_name, end) => {
  it.each(uses)('refuses %s by name, and the session goes on', async (_name, use) => {
    await withSession(ledger.knex, async (session) => {
      const inner = await session.transaction();
      await end(inner);
      expect(await caught(use(inner))).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('savepoint') });
      await insert(session, 'after');
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after']);
  });
});

describe('when a savepoint has been rolled back, and one inside it was open', () => {
  const open = async (session: Knex) => {
    const outer = await session.transaction();
    const inner = await outer.transaction();
    await insert(inner, 'x');
    await outer.rollback();
    return inner;
  };

  it.each(uses)('refuses %s on that by name, and the session goes on', async (_name, use) => {
    await withSession(ledger.knex, async (session) => {
      const inner = await open(session);
      expect(inner.isCompleted()).toBe(true);
      expect(await caught(use(inner))).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('savepoint') });
      await insert(session, 'after');
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after']);
  });

  it('sends nothing for its commit(), which is refused', async () => {
    const heard: string[] = [];
    await withSession(ledger.knex, async (session) => {
      const inner = await open(session);
      session.on('query', ({ sql }) => heard.push(sql));
      expect(await caught(inner.commit())).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
      expect(await caught(inner.executionPromise)).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
      await insert(session, 'after');
    });
    expect(heard).toEqual([expect.stringMatching(/^insert/), 'COMMIT;']);
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after']);
  });

  it('sends nothing for its rollback(), which has happened', async () => {
    const heard: string[] = [];
    await withSession(ledger.knex, async (session) => {
      const inner = await open(session);
      session.on('query', ({ sql }) => heard.push(sql));
      await inner.rollback();
      await insert(session, 'after');
    });
    expect(heard).toEqual([expect.stringMatching(/^insert/), 'COMMIT;']);
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after']);
  });

  it('rejects the promise of one whose callback goes on', async () => {
    let work: Promise<unknown> | undefined;
    await withSession(ledger.knex, async (session) => {
      const outer = await session.transaction();
      let goOn = () => {};
      await new Promise<void>((resolve) => {
        work = caught(
          outer.transaction(async (inner) => {
            await insert(inner, 'x');
            resolve();
            await new Promise<void>((go) => {
              goOn = go;
            });
            return 'done';
          }),
        );
      });
      await outer.rollback();
      goOn();
      expect(await work).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    });
    expect(await ledger.names()).toEqual(UNCHANGED);
  });
});

describe('when a savepoint has been released, and one inside it was open', () => {
  it.each(uses)('refuses %s on that by name, and stores nothing: it was not closed', async (_name, use) => {
    const work = withSession(ledger.knex, async (session) => {
      const outer = await session.transaction();
      const inner = await outer.transaction();
      await insert(inner, 'x');
      await caught(outer.commit());
      expect(inner.isCompleted()).toBe(true);
      expect(await caught(use(inner))).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('savepoint') });
    });
    await expect(work).rejects.toMatchObject({ code: 'ERR_SAVEPOINT_OPEN' });
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it.each(['commit', 'rollback'] as const)('does not let its %s() help, which comes too late', async (late) => {
    const work = withSession(ledger.knex, async (session) => {
      const outer = await session.transaction();
      const inner = await outer.transaction();
      await insert(inner, 'x');
      await caught(outer.commit());
      await caught(inner[late]());
    });
    await expect(work).rejects.toMatchObject({ code: 'ERR_SAVEPOINT_OPEN' });
    expect(await ledger.names()).toEqual(UNCHANGED);
  });
});

describe('when a statement in a savepoint is not awaited', () => {
  it.each([0, 1, 2, 3, 5, 8])('is rolled back with it, or refused: %i steps later', async (count) => {
    await withSession(ledger.knex, async (session) => {
      let stray: Promise<unknown> | undefined;
      const work = session.transaction(async (inner) => {
        await insert(inner, 'x');
        stray = caught(insert(inner, 'stray'));
        await steps(count);
        throw failure;
      });
      await expect(work).rejects.toBe(failure);
      await stray;
      await insert(session, 'after');
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after']);
  });

  it.each([0, 1, 2, 3, 5, 8])('is stored with it, or refused by name: %i steps later', async (count) => {
    let stray: Promise<any> | undefined;
    await withSession(ledger.knex, async (session) => {
      await session.transaction(async (inner) => {
        await insert(inner, 'x');
        stray = caught(insert(inner, 'stray'));
        await steps(count);
      });
      await stray;
    });
    const outcome = await stray;
    if (outcome !== 'no error') expect(outcome).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    expect(await ledger.names()).toEqual([...UNCHANGED, ...(outcome === 'no error' ? ['stray'] : []), 'x']);
  });

  it.each(['commit', 'rollback'] as const)('never runs outside of it, when %s() is called in the same turn', async (end) => {
    let stray: any;
    await withSession(ledger.knex, async (session) => {
      await session.transaction((inner) => {
        stray = caught(insert(inner, 'stray'));
        inner[end]();
      });
      stray = await stray;
      // Whatever else the savepoint had let out would show here.
      await session.transaction(async (other) => other('people')).catch(() => {});
    });

    if (stray !== 'no error') expect(stray).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    expect(await ledger.names()).toEqual(end === 'commit' && stray === 'no error' ? [...UNCHANGED, 'stray'] : UNCHANGED);
  });

  it('does not fail the savepoint when it comes from Promise.all with one that fails', async () => {
    await withSession(ledger.knex, async (session) => {
      const work = session.transaction((inner) => Promise.all(['x', 'Ann', 'y', 'z'].map((name) => insert(inner, name))));
      await expect(work).rejects.toMatchObject({ code: '23505' });
      await insert(session, 'after');
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after']);
  });
});

describe('when a statement of the session runs while a savepoint is open (hazard 6)', () => {
  it('is stored, if the savepoint is released', async () => {
    await withSession(ledger.knex, (session) =>
      session.transaction(async (inner) => [await insert(inner, 'x'), await insert(session, 'y')]),
    );
    expect(await ledger.names()).toEqual([...UNCHANGED, 'x', 'y']);
  });

  it('is lost in silence with a Knex.Transaction, if the savepoint is rolled back', async () => {
    await ledger.knex.transaction(async (trx) => {
      await caught(trx.transaction(async () => Promise.reject([await insert(trx, 'y'), failure][1])));
    });
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it('is not lost in silence with a session: a named error, and all is rolled back', async () => {
    const work = withSession(ledger.knex, async (session) => {
      await insert(session, 'before');
      await caught(session.transaction(async () => Promise.reject([await insert(session, 'y'), failure][1])));
    });
    await expect(work).rejects.toMatchObject({ code: 'ERR_SAVEPOINT_OPEN' });
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it('does not mind one that reads', async () => {
    await withSession(ledger.knex, async (session) => {
      await insert(session, 'before');
      await caught(session.transaction(async () => Promise.reject([await session('people'), failure][1])));
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'before']);
  });
});

describe('when the session ends while a savepoint is open', () => {
  it('refuses what the savepoint still does', async () => {
    const seen: Record<string, unknown> = {};
    await withSession(ledger.knex, async (session) => {
      let savepoint: Promise<unknown> | undefined;
      await new Promise<void>((resolve) => {
        savepoint = caught(
          session.transaction(async (inner) => {
            await insert(inner, 'x');
            await session.rollback(failure);
            Object.assign(seen, { isCompleted: inner.isCompleted(), statement: await caught(insert(inner, 'y')) });
            resolve();
          }),
        );
      });
      Object.assign(seen, { savepoint: await savepoint, session: await caught(session.executionPromise) });
    }).catch(() => {});

    const closed = expect.objectContaining({ code: 'ERR_SESSION_CLOSED' });
    expect(seen).toEqual({ isCompleted: true, statement: closed, savepoint: closed, session: failure });
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it('never runs a savepoint that is opened afterwards', async () => {
    const session = await withSession(ledger.knex, async (session) => [await insert(session, 'x'), session][1] as typeof session);
    let isRun = false;
    const work = session.transaction(async () => {
      isRun = true;
    });

    await expect(work).rejects.toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    await expect(session.transaction()).rejects.toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    expect(isRun).toBe(false);
  });

  it('rejects everything when the connection is lost, and leaks nothing', async () => {
    const knex = ledger.connect({ pool: { min: 0, max: 1 }, log: { warn() {}, error() {} } });
    const work = withSession(knex, (session) =>
      session.transaction(async (inner) => {
        const pid = (await inner.raw('select pg_backend_pid() as pid')).rows[0].pid;
        await insert(inner, 'x');
        await ledger.admin.raw('select pg_terminate_backend(?)', [pid]);
        await insert(inner, 'y');
      }),
    );

    await expect(work).rejects.toThrow();
    expect(poolUsage(knex)).toMatchObject({ used: 0 });
    expect(await knex('people').pluck('name')).toEqual(UNCHANGED);
  });
});
