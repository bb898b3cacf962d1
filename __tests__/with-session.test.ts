import { setImmediate as nextTurn } from 'node:timers/promises';
import { CommitUnknownError, type Session, SessionUnavailableError, TransactionAbortedError, withSession } from 'express-knex-session';
import { type AtCommit, controlOf, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();
const put = (session: Session, id: string, atCommit?: AtCommit) => session('notes').insert({ id, at_commit: atCommit ?? null });
const used = () => poolUsage(ledger.knex).used;
const failure = new Error('mine');

describe('when the work of withSession() succeeds', () => {
  it('commits, gives the connection back, and returns what the work returns', async () => {
    const result = await withSession(ledger.knex, async (session) => {
      expect(used()).toBe(0);
      await put(session, 'a');
      expect(used()).toBe(1);
      return { value: 7 };
    });
    expect(used()).toBe(0);
    expect(result).toEqual({ value: 7 });
    expect(await ledger.stored()).toEqual(['a']);
  });

  it('returns only after COMMIT has succeeded', async () => {
    const held = await ledger.holdCommits();
    let isDone = false;
    const done = withSession(ledger.knex, (session) => put(session, 'a', 'wait')).then(() => {
      isDone = true;
    });
    await held.waiting();
    expect(isDone).toBe(false);
    await held.release();
    await done;
    expect(await ledger.stored()).toEqual(['a']);
  });

  it('runs the query that it returns, and takes work that is not asynchronous', async () => {
    expect(await withSession(ledger.knex, (session) => put(session, 'a').returning('id'))).toEqual([{ id: 'a' }]);
    expect(await withSession(ledger.knex, () => 7)).toBe(7);
    expect(await ledger.stored()).toEqual(['a']);
  });

  it('takes no connection if no statement was run', async () => {
    const { knex, proxy } = await ledger.throughProxy();
    expect(await withSession(knex, async (session) => session.outcome)).toBe('unused');
    expect(proxy.connections()).toBe(0);
  });

  it('drains statements that the work did not await, and refuses those that come later', async () => {
    let late: unknown;
    await withSession(ledger.knex, async (session) => {
      put(session, 'a').catch(() => {});
      put(session, 'b').catch(() => {});
      void (async () => {
        for (let turn = 0; turn < 10; turn++) await nextTurn();
        late = await put(session, 'late').catch((error) => error);
      })();
    });
    expect(await ledger.stored()).toEqual(['a', 'b']);
    await eventually(() => expect(late).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('withSession()') }));
  });

  it('gives each call a transaction of its own', async () => {
    const ids = await Promise.all(
      [0, 1, 2].map((i) =>
        withSession(ledger.knex, async (session) => {
          await put(session, String(i));
          const { rows } = await session.raw('SELECT pg_current_xact_id()::text AS id');
          return rows[0].id;
        }),
      ),
    );
    expect(new Set(ids).size).toBe(3);
  });

  it('may be called inside itself: two units of work', async () => {
    await expect(
      withSession(ledger.knex, async (outer) => {
        await put(outer, 'outer');
        await withSession(ledger.knex, (inner) => put(inner, 'inner'));
        throw failure;
      }),
    ).rejects.toBe(failure);
    expect(await ledger.stored()).toEqual(['inner']);
  });
});

describe('when the work of withSession() fails', () => {
  it.each([
    ['rejects', async () => Promise.reject(failure)],
    [
      'throws',
      () => {
        throw failure;
      },
    ],
  ])('because it %s: rolls back, and rejects with the same error', async (_, fail) => {
    await expect(withSession(ledger.knex, (session) => put(session, 'a').then(fail))).rejects.toBe(failure);
    await expect(withSession(ledger.knex, fail)).rejects.toBe(failure);
    expect(used()).toBe(0);
    expect(await ledger.stored()).toEqual([]);
  });

  it('has rolled back when it rejects, and sent no COMMIT', async () => {
    const { knex, proxy } = await ledger.throughProxy();
    await withSession(knex, (session) => put(session, 'a').then(() => Promise.reject(failure))).catch(() => {});
    expect(controlOf(proxy)).toEqual(['BEGIN;', 'ROLLBACK']);
    expect(poolUsage(knex).used).toBe(0);
  });

  it('keeps the error of the work if ROLLBACK fails, gives that to onError, and drops the connection', async () => {
    const { knex, proxy } = await ledger.throughProxy();
    proxy.onFrontend(({ text }) => (text.startsWith('ROLLBACK') ? 'cut-before' : undefined));
    const reported: unknown[] = [];
    const work = async (session: Session) => {
      await put(session, 'a');
      throw failure;
    };
    await expect(withSession(knex, work, { onError: (error) => reported.push(error) })).rejects.toBe(failure);
    expect(reported).toEqual([expect.objectContaining({ message: expect.stringContaining('Connection terminated') })]);
    expect(poolUsage(knex).used).toBe(0);
    await withSession(knex, (session) => put(session, 'b'));
    expect(await ledger.stored()).toEqual(['b']);
  });

  it('does not run the statements that still wait for their turn', async () => {
    const statements: Promise<unknown>[] = [];
    await withSession(ledger.knex, async (session) => {
      await put(session, 'a');
      for (const id of ['b', 'c', 'd']) statements.push(Promise.resolve(put(session, id)).catch((error) => error.code));
      throw failure;
    }).catch(() => {});
    expect(await Promise.all(statements)).toContain('ERR_SESSION_CLOSED');
    expect(await ledger.stored()).toEqual([]);
  });
});

describe('when COMMIT of withSession() fails', () => {
  it('rejects with its error', async () => {
    await expect(withSession(ledger.knex, (session) => put(session, 'a', 'fail'))).rejects.toMatchObject({ code: '23514' });
    expect(used()).toBe(0);
    expect(await ledger.stored()).toEqual([]);
  });

  it('rejects with ERR_TRANSACTION_ABORTED if an error was swallowed', async () => {
    const work = async (session: Session) => {
      await put(session, 'a');
      await put(session, 'a').catch(() => {});
      return 'fine';
    };
    const rejection = await withSession(ledger.knex, work).catch((error) => error);
    expect(rejection).toBeInstanceOf(TransactionAbortedError);
    expect(rejection.cause).toMatchObject({ code: '23505' });
    expect(await ledger.stored()).toEqual([]);
  });

  it('rejects with ERR_COMMIT_UNKNOWN if the connection was lost', async () => {
    const knex = ledger.pool();
    await expect(withSession(knex, (session) => put(session, 'a', 'die'))).rejects.toBeInstanceOf(CommitUnknownError);
    expect(poolUsage(knex).used).toBe(0);
  });

  it('rejects with ERR_SESSION_UNAVAILABLE if there is no database', async () => {
    const knex = ledger.pool({ connection: 'postgres://localhost:1/nothing' });
    await expect(withSession(knex, (session) => put(session, 'a'))).rejects.toBeInstanceOf(SessionUnavailableError);
    await expect(withSession(knex, (session) => put(session, 'a').catch(() => {}))).rejects.toBeInstanceOf(SessionUnavailableError);
  });
});

describe('when the work ends its session itself', () => {
  it('leaves it committed, whatever comes after', async () => {
    const work = async (session: Session) => {
      await put(session, 'a');
      await session.commit();
      expect(session.outcome).toBe('committed');
      throw failure;
    };
    await expect(withSession(ledger.knex, work)).rejects.toBe(failure);
    expect(await ledger.stored()).toEqual(['a']);
  });

  it('leaves it rolled back', async () => {
    const work = async (session: Session) => {
      await put(session, 'a');
      await session.rollback();
      return 7;
    };
    expect(await withSession(ledger.knex, work)).toBe(7);
    expect(await ledger.stored()).toEqual([]);
  });

  it('is rolled back by setRollbackOnly(), and returns its result', async () => {
    const work = async (session: Session) => {
      session.setRollbackOnly();
      await put(session, 'a');
      return 7;
    };
    expect(await withSession(ledger.knex, work)).toBe(7);
    expect(await ledger.stored()).toEqual([]);
  });

  it('rejects if its own commit() failed, even if it swallowed that', async () => {
    const work = async (session: Session) => {
      await put(session, 'a', 'fail');
      await session.commit().catch(() => {});
    };
    await expect(withSession(ledger.knex, work)).rejects.toMatchObject({ code: '23514' });
  });
});

describe('when withSession() is given a Knex.Transaction', () => {
  it('is a savepoint in it', async () => {
    await ledger.knex.transaction(async (trx) => {
      await trx('notes').insert({ id: 'outer' });
      await withSession(trx, (session) => put(session, 'kept'));
      await withSession(trx, (session) => put(session, 'lost').then(() => Promise.reject(failure))).catch(() => {});
    });
    expect(await ledger.stored()).toEqual(['kept', 'outer']);
  });
});

describe('when withSession() is called wrongly', () => {
  it.each([
    ['no knex', () => withSession(undefined as never, async () => {}), /Expected `knex`/],
    ['no work', () => withSession(ledger.knex, undefined as never), /Expected `work` to be a function/],
    ['a promise for work', () => withSession(ledger.knex, Promise.resolve() as never), /Expected `work` to be a function/],
    ["a request's option", () => withSession(ledger.knex, async () => {}, { commitAt: 'end' } as never), /commitAt/],
  ])('rejects %s, and says what it expects', async (_, call, message) => {
    await expect(call()).rejects.toThrow(message);
    await expect(call()).rejects.toBeInstanceOf(TypeError);
  });
});
