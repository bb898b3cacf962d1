import { withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { caught, comparable, insert, Ledger, outers, UNCHANGED } from './support/knex';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

// Scenario 48: a transaction in place of `knex`; see outer-transaction-http.test.ts for requests.
failOnWarnings();
const ledger = Ledger.forTests();
const failure = new RangeError('no');

const namesIn = (trx: Knex): PromiseLike<string[]> => trx('people').orderBy('name').pluck('name');

describe.each(outers)('when a session is made of %s', (_name, outer) => {
  it('is a savepoint in it: stored when that commits', async () => {
    await outer(ledger.knex, async (trx) => {
      await insert(trx, 'before');
      const result = await withSession(trx, async (session) => [await insert(session, 'x'), await namesIn(session)][1]);
      expect(result).toEqual([...UNCHANGED, 'before', 'x']);
      expect(await namesIn(trx)).toEqual([...UNCHANGED, 'before', 'x']);
      expect(await ledger.names()).toEqual(UNCHANGED);
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'before', 'x']);
  });

  it('is gone when that is rolled back', async () => {
    const work = outer(ledger.knex, async (trx) => {
      await withSession(trx, (session) => insert(session, 'x'));
      throw failure;
    });
    await expect(work).rejects.toBe(failure);
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it('is rolled back alone when its work fails', async () => {
    await outer(ledger.knex, async (trx) => {
      await insert(trx, 'before');
      await expect(withSession(trx, async (session) => Promise.reject([await insert(session, 'x'), failure][1]))).rejects.toBe(failure);
      await expect(withSession(trx, (session) => insert(session, 'Ann'))).rejects.toMatchObject({ code: '23505' });
      await withSession(trx, async (session) => session.setRollbackOnly(await insert(session, 'y')));
      await insert(trx, 'after');
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after', 'before']);
  });

  it('says that an error was swallowed, and leaves the outer one usable', async () => {
    await outer(ledger.knex, async (trx) => {
      const work = withSession(trx, async (session) => {
        await insert(session, 'x');
        await caught(insert(session, 'Ann'));
        expect(await caught(insert(session, 'y'))).toMatchObject({ code: '25P02', cause: { code: '23505' } });
      });
      await expect(work).rejects.toMatchObject({ code: 'ERR_TRANSACTION_ABORTED', cause: { code: '23505' } });
      await insert(trx, 'after');
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after']);
  });

  it('sends nothing when nothing is run', async () => {
    const knex = ledger.connect();
    const heard: string[] = [];
    await outer(knex, async (trx) => {
      knex.on('query', ({ sql }) => heard.push(sql));
      await withSession(trx, async (session) => expect(session.outcome).toBe('unused'));
      knex.removeAllListeners('query');
    });
    expect(heard).toEqual([]);
  });

  it('tells listeners on the session, on the outer one and on the root knex of every statement once', async () => {
    const knex = ledger.connect();
    const heard = { session: [] as string[], inner: [] as string[], outer: [] as string[], root: [] as string[] };
    const errors: unknown[] = [];
    const listen = (emitter: Knex, list: string[]) =>
      emitter.on('query', ({ sql }) => list.push(sql)).on('query-error', (error) => errors.push(error));
    const failed = await outer(knex, async (trx) => {
      await trx('people').first();
      listen(knex, heard.root);
      listen(trx, heard.outer);
      const error = await caught(
        withSession(trx, async (session) => {
          listen(session, heard.session);
          await insert(session, 'x');
          await session.transaction(async (inner) => {
            listen(inner, heard.inner);
            await insert(inner, 'y');
          });
          await insert(session, 'Ann');
        }),
      );
      for (const emitter of [knex, trx]) emitter.removeAllListeners('query');
      return error;
    });

    const insertion = expect.stringMatching(/^insert/);
    const all = [
      'SAVEPOINT id1;',
      insertion,
      'SAVEPOINT id2;',
      insertion,
      'RELEASE SAVEPOINT id2;',
      insertion,
      'ROLLBACK TO SAVEPOINT id1',
    ];
    expect([comparable(heard.root), comparable(heard.outer)]).toEqual([all, all]);
    // As with a nested transaction of Knex, nobody has ears on it before its SAVEPOINT.
    expect(heard.session).toEqual(heard.root.slice(1));
    expect(heard.inner).toEqual(heard.root.slice(3, 5));
    expect(errors).toEqual([failed, failed, failed]);
  });

  it('tells a savepoint nothing of what comes after it', async () => {
    const heard: string[] = [];
    await outer(ledger.knex, async (trx) => {
      await withSession(trx, (session) =>
        session.transaction(async (inner) => {
          inner.on('query', ({ sql }) => heard.push(sql.split(' ')[0]));
          await insert(inner, 'x');
        }),
      );
      await trx('people').first();
    });
    expect(heard).toEqual(['insert', 'RELEASE']);
  });

  it('takes no connection of its own', async () => {
    const knex = ledger.connect({ pool: { min: 0, max: 1 }, acquireConnectionTimeout: 500 });
    await outer(knex, async (trx) => {
      await trx('people').first();
      let requests = 0;
      knex.client.pool.on('acquireRequest', () => requests++);
      await withSession(trx, (session) => insert(session, 'x'));
      await caught(withSession(trx, (session) => insert(session, 'Ann')));
      expect([requests, poolUsage(knex)]).toEqual([0, { used: 1, free: 0, pendingAcquires: 0 }]);
    });
    expect(poolUsage(knex)).toMatchObject({ used: 0 });
  });

  it('runs several that are started at once, one after the other', async () => {
    const order: string[] = [];
    await outer(ledger.knex, async (trx) => {
      const run = (name: string) =>
        withSession(trx, async (session) => {
          await insert(session, name);
          order.push(`${name} begins`);
          await session.raw('select pg_sleep(0.005)');
          order.push(`${name} ends`);
          if (name === 'b') throw failure;
        });
      const results = await Promise.allSettled(['a', 'b', 'c', 'd'].map(run));
      expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled', 'fulfilled']);
    });
    expect(order).toEqual(['a', 'b', 'c', 'd'].flatMap((name) => [`${name} begins`, `${name} ends`]));
    expect(await ledger.names()).toEqual([...UNCHANGED, 'a', 'c', 'd']);
  });

  it('knows its parent', async () => {
    await outer(ledger.knex, async (trx) => {
      await withSession(trx, async (session) => {
        expect([session.isTransaction, session.parentTransaction === trx, session.isCompleted()]).toEqual([true, true, false]);
        await session.transaction(async (inner) => expect(inner.parentTransaction === session).toBe(true));
      });
      expect(trx.isCompleted()).toBe(false);
    });
  });

  it('ends by commit() and rollback(), and is closed then, and the outer one is not', async () => {
    await outer(ledger.knex, async (trx) => {
      for (const end of ['commit', 'rollback'] as const) {
        await caught(
          withSession(trx, async (session) => {
            await insert(session, end);
            await session[end]();
            expect(await caught(insert(session, 'late'))).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
            expect([session.isCompleted(), trx.isCompleted()]).toEqual([true, false]);
          }),
        );
      }
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'commit']);
  });

  it('has savepoints, streams, schema, batches, and all that a session has', async () => {
    await outer(ledger.knex, async (trx) => {
      const seen = await withSession(trx, async (session) => {
        await session.batchInsert('people', [{ name: 'x' }, { name: 'y' }], 1);
        await caught(session.transaction(async (inner) => Promise.reject([await insert(inner, 'z'), failure][1])));
        const inner = await session.transaction({ doNotRejectOnRollback: true });
        await insert(inner, 'w');
        await inner.commit();
        await session.schema.createTable('notes', (table) => void table.increments());
        await Promise.all([1, 2, 3].map(() => session('notes').insert({})));
        const names: string[] = [];
        for await (const { name } of session('people').orderBy('id').stream()) names.push(name);
        return [names, await session.schema.hasTable('notes'), await session('notes').count()];
      });
      expect(seen).toEqual([[...UNCHANGED, 'x', 'y', 'w'], true, [{ count: '3' }]]);
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'w', 'x', 'y']);
  });

  it('is rolled back alone when it leaves a savepoint open, and says so', async () => {
    await outer(ledger.knex, async (trx) => {
      const work = withSession(trx, async (session) => insert(await session.transaction(), 'x'));
      await expect(work).rejects.toMatchObject({ code: 'ERR_SAVEPOINT_OPEN' });
      await insert(trx, 'after');
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after']);
  });

  it('is stored after an error that a savepoint made by hand has undone', async () => {
    await outer(ledger.knex, (trx) =>
      withSession(trx, async (session) => {
        await session.raw('SAVEPOINT mine');
        await caught(insert(session, 'Ann'));
        await session.raw('ROLLBACK TO SAVEPOINT mine');
        await insert(session, 'x');
      }),
    );
    expect(await ledger.names()).toEqual([...UNCHANGED, 'x']);
  });

  it('refuses a raw COMMIT, which would end the outer one', async () => {
    await outer(ledger.knex, async (trx) => {
      await expect(withSession(trx, (session) => session.raw('COMMIT'))).rejects.toMatchObject({ code: 'ERR_TRANSACTION_CONTROL' });
      await insert(trx, 'after');
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'after']);
  });

  it.each(['commit', 'rollback'] as const)('is refused by name when the outer one has ended by its %s()', async (end) => {
    // Not what `outer` returns: that may settle at once when the outer one ends.
    const refused = new Promise<unknown>((resolve) => {
      outer(ledger.knex, async (trx) => {
        await insert(trx, 'before');
        await trx[end]();
        resolve(caught(withSession(trx, (session) => insert(session, 'x'))));
      }).catch(() => {});
    });

    expect(await refused).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    expect(await ledger.names()).not.toContain('x');
  });

  it('says what has aborted the outer one, when it has failed before', async () => {
    const errors: any[] = [];
    const work = outer(ledger.knex, async (trx) => {
      errors.push(await caught(insert(trx, 'Ann')), await caught(withSession(trx, (session) => insert(session, 'x'))));
      throw failure;
    });
    await expect(work).rejects.toBe(failure);

    const causes: unknown[] = [];
    for (let cause = errors[1].cause; cause; cause = cause.cause) causes.push(cause.code);
    expect(errors[1].code).toMatch(/^ERR_SESSION_/);
    expect(causes).toContain('25P02');
  });
});
