import express, { type RequestHandler } from 'express';
import { getSession, type Session, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import { get, listen } from './support/http';
import { answerError, caught, insert, Ledger, UNCHANGED } from './support/knex';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = Ledger.forTests();
const failure = new RangeError('no');

afterEach(() => expect(poolUsage(ledger.knex)).toMatchObject({ used: 0, pendingAcquires: 0 }));

async function serve(handler: (session: Session, res: express.Response) => unknown) {
  const route: RequestHandler = async (req, res) => void (await handler(getSession(req), res));
  const server = await listen(express().use(sessionMiddleware(ledger.knex)).get('/', route).use(sessionErrorHandler(), answerError));
  const answer = await get(server.url);
  await server.close();
  return answer;
}

describe('when a savepoint is rolled back', () => {
  it('keeps what was done before and after it (scenario 45)', async () => {
    const answer = await serve(async (session, res) => {
      await insert(session, 'before');
      await expect(session.transaction(async (inner) => [await insert(inner, 'x'), await insert(inner, 'Ann')])).rejects.toMatchObject({
        code: '23505',
      });
      await insert(session, 'after');
      res.status(201).end();
    });

    expect(answer.status).toBe(201);
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after', 'before']);
  });

  it('keeps the other levels of three', async () => {
    for (const [level, kept] of [
      [1, []],
      [2, ['one']],
      [3, ['one', 'two']],
    ] as const) {
      await ledger.reset();
      const failAt = (at: number) => (at === level ? Promise.reject(failure) : Promise.resolve());
      await withSession(ledger.knex, async (session) => {
        await caught(
          session.transaction(async (one) => {
            await insert(one, 'one');
            await caught(
              one.transaction(async (two) => {
                await insert(two, 'two');
                await caught(two.transaction(async (three) => [await insert(three, 'three'), await failAt(3)]));
                await failAt(2);
              }),
            );
            await failAt(1);
          }),
        );
      });
      expect(await ledger.names()).toEqual([...UNCHANGED, ...kept]);
    }
  });

  it('reports the error of the application, also if ROLLBACK TO fails (hazard 5)', async () => {
    const work = withSession(ledger.knex, async (session) => {
      const pid = (await session.raw('select pg_backend_pid() as pid')).rows[0].pid;
      await session.transaction(async () => {
        await ledger.admin.raw('select pg_terminate_backend(?)', [pid]);
        throw failure;
      });
    });

    await expect(work).rejects.toBe(failure);
  });

  it('leaves a session whose first statement it was, usable', async () => {
    await withSession(ledger.knex, async (session) => {
      await caught(session.transaction(async () => Promise.reject(failure)));
      await insert(session, 'x');
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'x']);
  });
});

describe('when many savepoints are asked for at once (scenario 47)', () => {
  it('runs ten one after the other, in order, and loses none', async () => {
    const order: number[] = [];
    const results = await withSession(ledger.knex, (session) =>
      Promise.all(
        Array.from({ length: 10 }, (_, i) =>
          session.transaction(async (inner) => {
            order.push(i);
            await insert(inner, `x${i}`);
            await Promise.all([insert(inner, `y${i}`), inner.raw('select pg_sleep(0.002)')]);
            order.push(i);
            return i;
          }),
        ),
      ),
    );

    expect(results).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    expect(order).toEqual(results.flatMap((i) => [i, i]));
    expect(await ledger.names()).toHaveLength(23);
  });

  it('keeps those that succeed, and only those', async () => {
    await withSession(ledger.knex, async (session) => {
      const work = Array.from({ length: 10 }, (_, i) =>
        session.transaction(async (inner) => [await insert(inner, `x${i}`), i % 2 || (await insert(inner, 'Ann'))]),
      );
      expect((await Promise.allSettled(work)).map(({ status }) => status === 'fulfilled')).toEqual(work.map((_, i) => i % 2 === 1));
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'x1', 'x3', 'x5', 'x7', 'x9']);
  });

  it('stores nothing of those that still run when the savepoint around them fails, and goes on', async () => {
    await withSession(ledger.knex, async (session) => {
      const inner: Promise<unknown>[] = [];
      const outer = session.transaction(async (savepoint) => {
        for (const name of ['Ann', 'y', 'z'])
          inner.push(savepoint.transaction(async (one) => [await insert(one, name), await insert(one, `${name}!`)]));
        await Promise.all(inner);
      });
      await expect(outer).rejects.toMatchObject({ code: '23505' });
      await Promise.allSettled(inner);
      await insert(session, 'after');
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after']);
  });
});

describe('when a savepoint is never closed (scenario 46)', () => {
  it('is committed in silence by a Knex.Transaction (hazard 6)', async () => {
    await ledger.knex.transaction(async (trx) => insert(await trx.transaction(), 'x'));
    expect(await ledger.names()).toEqual([...UNCHANGED, 'x']);
  });

  const forgetful: [string, (session: Session) => Promise<unknown>][] = [
    ['as a promise', async (session) => insert(await session.transaction(), 'x')],
    ['as a provider', async (session) => insert(await session.transactionProvider()(), 'x')],
    [
      'by a callback that never calls commit',
      (session) => new Promise((resolve) => void session.transaction((inner) => void insert(inner, 'x').then(resolve))),
    ],
    ['inside one that is closed', (session) => session.transaction(async (outer) => void (await insert(await outer.transaction(), 'x')))],
    [
      'and awaits something else for ever',
      (session) =>
        new Promise(
          (resolve) => void session.transaction(async (inner) => [await insert(inner, 'x'), resolve(0), await new Promise(() => {})]),
        ),
    ],
  ];

  it.each(forgetful)('is a named error, and all is rolled back: %s', async (_name, forget) => {
    await expect(withSession(ledger.knex, forget)).rejects.toMatchObject({ code: 'ERR_SAVEPOINT_OPEN' });
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it.each(forgetful)('is a 500 for the client: %s', async (_name, forget) => {
    const answer = await serve(async (session, res) => {
      await forget(session);
      res.status(201).json({ stored: true });
    });

    expect([answer.status, JSON.parse(answer.body).code]).toEqual([500, 'ERR_SAVEPOINT_OPEN']);
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it('refuses commit() in the middle of it', async () => {
    let error: any;
    await caught(
      withSession(ledger.knex, (session) =>
        session.transaction(async (inner) => {
          await insert(inner, 'x');
          error = await caught(session.commit());
        }),
      ),
    );

    expect(error).toMatchObject({ code: 'ERR_SAVEPOINT_OPEN' });
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it('says nothing of it when the session is rolled back anyway', async () => {
    const answer = await serve(async (session, res) => {
      await insert(await session.transaction(), 'x');
      res.status(409).end('conflict');
    });
    expect([answer.status, answer.body]).toEqual([409, 'conflict']);

    await expect(withSession(ledger.knex, async (session) => Promise.reject([await session.transaction(), failure][1]))).rejects.toBe(
      failure,
    );
    await withSession(ledger.knex, async (session) => session.setRollbackOnly(await insert(await session.transaction(), 'x')));
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it('does not count one that was rolled back with the savepoint around it', async () => {
    await withSession(ledger.knex, async (session) => {
      await caught(
        session.transaction(async (outer) => {
          await insert(await outer.transaction(), 'x');
          throw failure;
        }),
      );
      await insert(session, 'after');
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after']);
  });
});

describe('when an error is swallowed inside a savepoint', () => {
  it('is told by a Knex.Transaction at RELEASE, and nothing can go on', async () => {
    await ledger.knex.transaction(async (trx) => {
      await insert(trx, 'before');
      await expect(trx.transaction(async (inner) => void (await caught(insert(inner, 'Ann'))))).rejects.toMatchObject({ code: '25P02' });
      await expect(trx('people')).rejects.toMatchObject({ code: '25P02' });
    });
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it('is told at RELEASE with the first error as its cause, and the session goes on (hazard 2)', async () => {
    await withSession(ledger.knex, async (session) => {
      await insert(session, 'before');
      let first: unknown;
      const work = session.transaction(async (inner) => {
        await insert(inner, 'x');
        first = await caught(insert(inner, 'Ann'));
      });
      const error = await caught(work);
      expect(error).toMatchObject({ code: '25P02' });
      expect(error.cause).toBe(first);
      await insert(session, 'after');
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after', 'before']);
  });

  it('names the first error until the savepoint is rolled back, and not after (scenario 26)', async () => {
    const work = withSession(ledger.knex, async (session) => {
      const inner = await session.transaction();
      const first = await caught(inner('nothing'));
      expect([(await caught(inner('people'))).cause === first, (await caught(session('people'))).cause === first]).toEqual([true, true]);
      await inner.rollback();
      expect(await session('people').count()).toEqual([{ count: '3' }]);
      const second = await caught(session('nowhere'));
      expect((await caught(session('people'))).cause).toBe(second);
      throw second;
    });
    await expect(work).rejects.toMatchObject({ code: '42P01' });
  });

  it('keeps naming the error from before the savepoint', async () => {
    await caught(
      withSession(ledger.knex, async (session) => {
        const first = await caught(session('nothing'));
        let isRun = false;
        const error = await caught(
          session.transaction(async () => {
            isRun = true;
          }),
        );
        expect([error.code, error.cause === first, isRun]).toEqual(['25P02', true, false]);
        expect((await caught(session('people'))).cause).toBe(first);
      }),
    );
  });
});
