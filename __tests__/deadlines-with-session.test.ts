import { type Session, SessionTimeoutError, withSession } from 'express-knex-session';
import { expectNothingTold, never, rejection } from './support/deadlines';
import { useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();
const limits = { transactionTimeout: 50, settleTimeout: 1_000 };
const put = (session: Session, id: string) => session('notes').insert({ id });

describe('when the work of withSession() never ends', () => {
  it.each<[string, (session: Session) => Promise<unknown>]>([
    ['after a statement', (session) => put(session, 'a').then(never)],
    ['in a statement', (session) => session.raw('SELECT pg_sleep(10)')],
    ['after a statement that failed', (session) => session.raw('SELECT secret').then(never, never)],
    ['in a savepoint', (session) => session.transaction((trx) => trx('notes').insert({ id: 'a' }).then(never))],
    ['in a savepoint that waits for another of the session', (session) => session.transaction(() => session.transaction(async () => {}))],
    ['with a savepoint open', async (session) => (await session.transaction())('notes').insert({ id: 'a' }).then(never)],
    ['behind a statement that is not awaited', async (session) => void session.raw('SELECT pg_sleep(10)').catch(() => {})],
    [
      'in commit(), behind such a statement',
      (session) => {
        session.raw('SELECT pg_sleep(10)').catch(() => {});
        return session.commit();
      },
    ],
  ])('rejects with ERR_SESSION_TIMEOUT, stores nothing, and gives the connection back: %s', async (_where, work) => {
    const reported: unknown[] = [];
    const error = await rejection(withSession(ledger.knex, work, { ...limits, onError: (reason) => reported.push(reason) }));
    expect(error).toBeInstanceOf(SessionTimeoutError);
    expect(error).toMatchObject({
      code: 'ERR_SESSION_TIMEOUT',
      status: 503,
      message: expect.stringContaining('50 ms (transactionTimeout)'),
    });
    expectNothingTold(error);
    expect(poolUsage(ledger.knex).used).toBe(0);
    await ledger.isClean();
    expect(await ledger.stored()).toEqual([]);
    expect(reported).toEqual([]);
  });

  it('tells the work: by the signal, by the statement that runs, and by all that comes later, with the reason as cause', async () => {
    const told: Record<string, any> = {};
    let session!: Session;
    const error = await rejection(
      withSession(
        ledger.knex,
        async (mine) => {
          session = mine;
          told['running'] = await rejection(mine.raw('SELECT pg_sleep(10)'));
          told['later'] = await rejection(put(mine, 'secret'));
          told['savepoint'] = await rejection(mine.transaction(async () => {}));
          told['stream'] = await rejection(
            (async () => {
              for await (const _row of mine.raw('SELECT 1').stream());
            })(),
          );
          told['commit'] = await rejection(mine.commit());
          told['rollbackOnly'] = await rejection((async () => mine.setRollbackOnly())());
        },
        limits,
      ),
    );
    await eventually(() => expect(told['rollbackOnly']).toBeDefined());
    expect(session.signal.aborted).toBe(true);
    expect(session.signal.reason).toBe(error);
    expect(told['running']).toBe(error);
    for (const name of ['later', 'savepoint', 'stream', 'rollbackOnly']) {
      expect(told[name]).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
      expect(told[name].cause).toBe(error);
    }
    // commit() must not resolve, for whatever reason it says.
    expect(told['commit']).toBeInstanceOf(Error);
    expectNothingTold(...Object.values(told));
    expect(session.outcome).toBe('rolled back');
    await session.rollback();
  });

  it('loses a late error of the work, and lets the process live', async () => {
    let isOver = false;
    const error = await rejection(
      withSession(
        ledger.knex,
        async (session) => {
          await put(session, 'a');
          await new Promise<void>((resolve) => session.signal.addEventListener('abort', () => resolve()));
          await new Promise(setImmediate);
          isOver = true;
          throw new Error('late');
        },
        limits,
      ),
    );
    expect(error).toMatchObject({ code: 'ERR_SESSION_TIMEOUT' });
    await eventually(() => expect(isOver).toBe(true));
  });

  it('does not end work that holds no connection: it may take as long as it likes', async () => {
    const slow = () => new Promise((resolve) => setTimeout(resolve, 250));
    const result = await withSession(
      ledger.knex,
      async (session) => {
        await slow();
        await put(session, 'a');
        await session.commit();
        await slow();
        return 'done';
      },
      { transactionTimeout: 200 },
    );
    expect(result).toBe('done');
    expect(await ledger.stored()).toEqual(['a']);
  });

  it('has a limit for each call', async () => {
    const work = async (session: Session) => {
      await session.raw('SELECT pg_sleep(0.2)');
      return 'done';
    };
    const [short, long, none] = await Promise.allSettled(
      [80, 2_000, 0].map((transactionTimeout) => withSession(ledger.knex, work, { transactionTimeout })),
    );
    expect(short).toMatchObject({ status: 'rejected', reason: { code: 'ERR_SESSION_TIMEOUT' } });
    expect([long, none]).toEqual(Array(2).fill({ status: 'fulfilled', value: 'done' }));
  });
});

describe('when the session stands in a Knex.Transaction', () => {
  it('rolls back what it has done, and leaves the rest of the outer transaction alone', async () => {
    await ledger.knex.transaction(async (outer) => {
      await outer('notes').insert({ id: 'outer' });
      const error = await rejection(
        withSession(outer, (session) => put(session, 'inner').then(() => session.raw('SELECT pg_sleep(10)')), limits),
      );
      expect(error).toMatchObject({ code: 'ERR_SESSION_TIMEOUT', cause: { code: '57014' } });
      await outer('notes').insert({ id: 'after' });
      await withSession(outer, (session) => put(session, 'next'));
    });
    expect((await ledger.stored()).sort()).toEqual(['after', 'next', 'outer']);
  });

  it('counts from its own beginning, and ends between statements too', async () => {
    await ledger.knex.transaction(async (outer) => {
      await outer.raw('SELECT pg_sleep(0.25)');
      await withSession(outer, (session) => put(session, 'quick'), { transactionTimeout: 200 });
      expect(await rejection(withSession(outer, (session) => put(session, 'hung').then(never), limits))).toMatchObject({
        code: 'ERR_SESSION_TIMEOUT',
      });
    });
    expect(await ledger.stored()).toEqual(['quick']);
  });

  it('waits for its turn no longer than acquireTimeout, and gives a savepoint that comes late back', async () => {
    await ledger.knex.transaction(async (outer) => {
      // Savepoints of one transaction follow each other.
      const first = await outer.transaction();
      const error = await rejection(withSession(outer, (session) => put(session, 'late'), { acquireTimeout: 60 }));
      expect(error).toMatchObject({ code: 'ERR_SESSION_UNAVAILABLE', cause: { message: expect.stringContaining('acquireTimeout') } });
      await first('notes').insert({ id: 'first' });
      await first.commit();
      await withSession(outer, (session) => put(session, 'second'));
    });
    expect((await ledger.stored()).sort()).toEqual(['first', 'second']);
  });
});
