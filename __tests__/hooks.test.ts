import type { Session } from 'express-knex-session';
import { RawClient } from './support/http';
import { caught } from './support/knex';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred, useBench } from './support/wire';

failOnWarnings();
const bench = useBench({ pool: { min: 0, max: 1 } });
const failure = new RangeError('no');

let ran: unknown[];
beforeEach(() => {
  ran = [];
});

/** Notes that it ran, and what was stored at that time, as another connection sees it. */
const looks = (name: string) => async () => void ran.push([name, await bench.stored()]);
const notes = (name: string) => () => void ran.push(name);

/** One of each kind, which notes that it ran. */
function addNotes(session: Session, of = ''): void {
  session.beforeCommit(notes(`beforeCommit${of}`));
  session.afterCommit(notes(`afterCommit${of}`));
  session.afterRollback(notes(`afterRollback${of}`));
}

describe('when the session commits', () => {
  it('calls afterCommit hooks after COMMIT, in order, and not afterRollback (scenario 49)', async () => {
    const answer = await bench.answer(async (req, res) => {
      req.session.afterCommit(looks('first'));
      await req.session('items').insert({ name: 'a' });
      req.session.afterRollback(notes('afterRollback'));
      req.session.afterCommit(looks('second'));
      req.session.beforeCommit(looks('beforeCommit'));
      res.status(201).json({});
    });

    expect(answer).toMatchObject({ status: 201, complete: true });
    expect(ran).toEqual([
      ['beforeCommit', []],
      ['first', ['a']],
      ['second', ['a']],
    ]);
    expect(bench.proxy.sql().at(-1)).toBe('COMMIT;');
  });

  it('holds the response until each afterCommit hook has ended, and no connection meanwhile', async () => {
    const [first, second] = [deferred(), deferred()];
    const [inFirst, inSecond] = [deferred(), deferred()];
    const url = new URL(
      bench.route(async (req, res) => {
        await req.session('items').insert({ name: 'a' });
        req.session.afterCommit(() => [inFirst.resolve(), first.promise][1]);
        req.session.afterCommit(() => [inSecond.resolve(), second.promise][1]);
        res.end('done');
      }),
    );
    const client = await RawClient.connect(Number(url.port));
    client.get(url.pathname, 'Connection: close');

    await inFirst.promise;
    expect(await bench.stored()).toEqual(['a']);
    expect(poolUsage(bench.knex).used).toBe(0);
    // Somebody else works meanwhile, on the pool's only connection.
    expect((await bench.answer(async (req, res) => res.json(await req.session('items').pluck('name')))).body).toBe('["a"]');
    first.resolve();
    await inSecond.promise;
    expect(client.received).toBe('');
    second.resolve();

    await client.closed;
    expect(client.received).toMatch(/^HTTP\/1.1 200 .*done/s);
  });

  it('keeps the commit when hooks throw, calls the others, and reports each error once (scenario 51)', async () => {
    const [sync, late] = [new Error('sync'), new Error('late')];
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      req.session.afterCommit(() => {
        throw sync;
      });
      req.session.afterCommit(async () => Promise.reject(late));
      req.session.afterCommit(notes('third'));
      res.end();
    });

    expect(answer.status).toBe(200);
    expect(ran).toEqual(['third']);
    expect(bench.reported).toEqual([sync, late]);
    expect(bench.errors).toEqual([]);
    expect(await bench.stored()).toEqual(['a']);
  });
});

describe('when the session is rolled back', () => {
  it.each<[string, Parameters<typeof bench.answer>[0], number]>([
    ['by a status', (_, res) => res.status(409).end(), 409],
    ['by a throw', () => Promise.reject(failure), 500],
    ['by setRollbackOnly()', (req, res) => [req.session.setRollbackOnly(), res.end()], 200],
  ])('calls afterRollback hooks only, in order, before the response: %s (scenario 50)', async (_name, end, status) => {
    const answer = await bench.answer(async (req, res, next) => {
      await req.session('items').insert({ name: 'a' });
      addNotes(req.session);
      req.session.afterRollback(() => void ran.push(bench.proxy.sql().at(-1), poolUsage(bench.knex).used));
      req.session.afterRollback(() => void ran.push(`head sent: ${res.socket?.bytesWritten}`));
      await end(req, res, next);
    });

    expect(answer.status).toBe(status);
    expect(ran).toEqual(['afterRollback', 'ROLLBACK', 0, 'head sent: 0']);
    expect(await bench.stored()).toEqual([]);
  });

  it('calls them before the error handlers, whose error stays the first one though a hook throws', async () => {
    bench.onErrorHandler = notes('error handler');
    const answer = await bench.answer((req) => {
      req.session.afterRollback(() => {
        ran.push('hook');
        throw new Error('of the hook');
      });
      throw failure;
    });

    expect(answer.status).toBe(500);
    expect(ran).toEqual(['hook', 'error handler']);
    expect(bench.errors).toEqual([failure]);
    expect(bench.reported).toMatchObject([{ message: 'of the hook' }]);
  });
});

describe('when a beforeCommit hook works in the session', () => {
  it('commits what it does, under the same transaction, and what hooks do that it registers', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      req.session.beforeCommit(async (session) => {
        ran.push(session === req.session, await session('items').pluck('name'));
        await session.transaction((savepoint) => savepoint('items').insert({ name: 'b' }));
        await req.session('items').insert({ name: 'c' });
        session.beforeCommit(async (again) => void (await again('items').insert({ name: 'd' })));
        session.afterCommit(looks('afterCommit'));
      });
      res.end();
    });

    expect(answer.status).toBe(200);
    expect(ran).toEqual([true, ['a'], ['afterCommit', ['a', 'b', 'c', 'd']]]);
    expect(bench.proxy.sql().filter((sql) => /^(BEGIN|COMMIT)/.test(sql))).toEqual(['BEGIN;', 'COMMIT;']);
  });

  it('drains the statements that it did not await', async () => {
    const answer = await bench.answer((req, res) => {
      req.session.beforeCommit((session) => {
        for (const name of ['a', 'b', 'c']) session('items').insert({ name }).then(notes(name));
      });
      res.end();
    });

    expect(answer.status).toBe(200);
    expect(ran).toEqual(['a', 'b', 'c']);
    expect(await bench.stored()).toEqual(['a', 'b', 'c']);
  });

  it.each<[string, (session: Session) => unknown, object]>([
    ['throws', () => Promise.reject(failure), { message: 'no' }],
    ['throws at once', () => Function('throw new RangeError("no")')(), { message: 'no' }],
    ['rejects without an error', () => Promise.reject(undefined), {}],
    ['runs a statement that fails', (session) => session('items').insert({ name: 'bad' }), { code: '23514' }],
    ['swallows an error of PostgreSQL', (session) => caught(session('items').insert({ name: 'bad' })), { code: 'ERR_TRANSACTION_ABORTED' }],
  ])('rolls back and answers with its error if it %s (scenario 52)', async (_name, hook, error) => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      req.session.beforeCommit(notes('first'));
      req.session.beforeCommit(hook);
      addNotes(req.session);
      res.set('Set-Cookie', 'a=b').status(201).json({});
    });

    expect(answer.status).toBe(500);
    expect(answer.headers['set-cookie']).toBeUndefined();
    expect(bench.errors).toEqual([expect.objectContaining(error)]);
    const runsAll = Object.hasOwn(error, 'code') && (error as { code: string }).code === 'ERR_TRANSACTION_ABORTED';
    expect(ran).toEqual(runsAll ? ['first', 'beforeCommit', 'afterRollback'] : ['first', 'afterRollback']);
    expect(await bench.stored()).toEqual([]);
  });

  it('is rolled back, with the response as it is, if it calls setRollbackOnly()', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      req.session.beforeCommit((session) => session.setRollbackOnly());
      addNotes(req.session);
      res.status(201).end('kept');
    });

    expect(answer).toMatchObject({ status: 201, body: 'kept' });
    expect(ran).toEqual(['beforeCommit', 'afterRollback']);
    expect(await bench.stored()).toEqual([]);
  });

  it.each<[string, (session: Session) => Promise<unknown>]>([
    ['commit', (session) => session.commit()],
    ['rollback', (session) => session.rollback()],
    ['checkpoint', (session) => session.checkpoint()],
  ])('refuses %s() by name, in any hook, rather than wait for itself', async (_name, end) => {
    const answer = await bench.answer((req, res) => {
      req.session.beforeCommit(async (session) => void ran.push((await caught(end(session))).code));
      req.session.afterCommit(async () => void ran.push((await caught(end(req.session))).code));
      res.end();
    });

    expect(answer.status).toBe(200);
    expect(ran).toEqual(['ERR_SESSION_CLOSED', 'ERR_SESSION_CLOSED']);
  });
});

describe('when a hook is registered', () => {
  it.each([undefined, null, 'x', {}, Promise.resolve()])('refuses %p, which is not a function', async (hook) => {
    const answer = await bench.answer((req) => req.session.afterCommit(hook as never));
    expect(answer.status).toBe(500);
    expect(bench.errors).toEqual([expect.any(TypeError)]);
    expect(bench.errors[0].message).toMatch(/^Expected the hook of `afterCommit` to be a function/);
  });

  it.each([
    [200, ['beforeCommit', 'afterCommit']],
    [404, ['afterRollback']],
  ])('runs though no statement ran, by the decision of a %d (scenario 56)', async (status, expected) => {
    const answer = await bench.answer((req, res) => [addNotes(req.session), res.status(status).end()]);
    expect(answer.status).toBe(status);
    expect(ran).toEqual(expected);
    expect(bench.proxy.sql()).toEqual([]);
  });

  it.each<[string, (session: Session, res: { end(): unknown }) => unknown]>([
    ['the response', (_, res) => res.end()],
    ['commit()', (session) => session.commit()],
    ['rollback()', (session) => session.rollback()],
  ])('refuses it after %s, and does not run it (scenario 55)', async (_name, end) => {
    const { promise, resolve } = deferred();
    await bench.answer(async (req, res) => {
      await end(req.session, res);
      for (const kind of ['beforeCommit', 'afterCommit', 'afterRollback'] as const) {
        expect(() => req.session[kind](notes(kind))).toThrow(expect.objectContaining({ code: 'ERR_SESSION_CLOSED' }));
      }
      res.end();
      resolve();
    });
    await promise;
    expect(ran).toEqual([]);
  });

  it('refuses it after the first byte, and statements with it', async () => {
    const { promise, resolve } = deferred<unknown[]>();
    await bench.answer(async (req, res) => {
      res.write('x');
      const refused = await caught((async () => req.session.afterCommit(notes('late')))());
      resolve([refused.code, (await caught(req.session('items').insert({ name: 'late' }))).code]);
      res.end();
    });
    expect(await promise).toEqual(['ERR_SESSION_CLOSED', 'ERR_SESSION_CLOSED']);
    expect([ran, await bench.stored(), poolUsage(bench.knex).used]).toEqual([[], [], 0]);
  });
});

describe('when a hook is registered on a savepoint', () => {
  it('is kept with a savepoint that is released, and dropped with one that is rolled back, or is in one', async () => {
    const answer = await bench.answer(async (req, res) => {
      const { session } = req;
      await session.transaction(async (released) => addNotes(released as Session, ' of released'));
      await caught(session.transaction(async (dropped) => [addNotes(dropped as Session), await Promise.reject(failure)]));
      await caught(
        session.transaction(async (outer) => {
          await outer.transaction(async (inner) => addNotes(inner as Session));
          throw failure;
        }),
      );
      await session.transaction(async (outer) => {
        await caught(outer.transaction(async (inner) => [addNotes(inner as Session), await Promise.reject(failure)]));
        (outer as Session).afterCommit((own) => ran.push(own === session));
      });
      const byHand = await session.transaction();
      (byHand as Session).afterCommit(notes('by hand'));
      await byHand.rollback();
      // A savepoint that is over takes no more.
      expect(() => (byHand as Session).afterCommit(notes('late'))).toThrow(expect.objectContaining({ code: 'ERR_SESSION_CLOSED' }));
      res.end();
    });

    expect(answer.status).toBe(200);
    expect(ran).toEqual(['beforeCommit of released', 'afterCommit of released', false]);
  });

  it('runs afterRollback, if the savepoint was kept and the session is not', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session.transaction(async (kept) => addNotes(kept as Session));
      res.status(400).end();
    });

    expect(answer.status).toBe(400);
    expect(ran).toEqual(['afterRollback']);
  });
});
