import { type Session, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { caught } from './support/knex';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred, type Handler, isSql, useBench } from './support/wire';

failOnWarnings();
const bench = useBench({}, { isolationLevel: 'repeatable read', settings: { 'app.tenant': 'a' } });
const failure = new RangeError('no');
const insert = (session: Knex, name: string) => session('items').insert({ name });
const ends = () => bench.proxy.sql().filter((sql) => /^(BEGIN|COMMIT|ROLLBACK)/.test(sql));

describe('when checkpoint() is called', () => {
  it('has committed and given the connection back when it resolves', async () => {
    const seen: unknown[] = [];
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      await req.session.checkpoint();
      seen.push(await bench.stored(), poolUsage(bench.knex).used, req.session.outcome, req.session.isCompleted());
      res.end();
    });

    expect(answer.status).toBe(200);
    expect(seen).toEqual([['a'], 0, 'committed', false]);
    expect(ends()).toHaveLength(2);
  });

  it('begins anew with the next statement, with the same modes and settings', async () => {
    const look = `select current_setting('transaction_isolation') as level, current_setting('app.tenant') as tenant,
      current_setting('app.user', true) as user, pg_current_xact_id()::text as id`;
    const seen: { id: string }[] = [];
    await bench.answer(async (req, res) => {
      const { session } = req;
      for (const part of [1, 2, 3]) {
        if (part === 2) await session.set({ 'app.user': '7' });
        if (part > 1) await session.checkpoint();
        seen.push((await session.raw(look)).rows[0]);
        expect(session.outcome).toBe('open');
      }
      res.end();
    });

    expect(seen).toMatchObject(
      [{ user: null }, { user: '7' }, { user: '7' }].map((user) => ({ level: 'repeatable read', tenant: 'a', ...user })),
    );
    expect(new Set(seen.map(({ id }) => id)).size).toBe(3);
  });

  it.each<[string, Handler, number]>([
    ['a status', (_, res) => res.status(409).end(), 409],
    ['a throw', () => Promise.reject(failure), 500],
    ['setRollbackOnly()', (req, res) => [req.session.setRollbackOnly(), res.end()], 200],
    ['rollback()', async (req, res) => [await req.session.rollback(), res.end()], 200],
    ['a failing COMMIT', async (req, res) => [await insert(req.session, 'a'), res.end()], 500],
  ])('keeps the first part if the rest is rolled back by %s; hooks belong to their part', async (_name, end, status) => {
    const ran: unknown[] = [];
    const addNotes = (session: Session, part: number) => {
      for (const kind of ['beforeCommit', 'afterCommit', 'afterRollback'] as const) session[kind](() => ran.push(`${kind} of ${part}`));
    };
    const answer = await bench.answer(async (req, res, next) => {
      await insert(req.session, 'a');
      addNotes(req.session, 1);
      await req.session.checkpoint();
      ran.push('checkpoint');
      await insert(req.session, 'b');
      req.session.afterRollback(() => ran.push('afterRollback of 2'));
      await end(req, res, next);
    });

    expect([answer.status, await bench.stored()]).toEqual([status, ['a']]);
    expect(ran).toEqual(['beforeCommit of 1', 'afterCommit of 1', 'checkpoint', 'afterRollback of 2']);
  });

  it('does nothing before the first statement, or a second time in a row', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session.checkpoint();
      expect(bench.proxy.sql()).toEqual([]);
      await insert(req.session, 'a');
      await Promise.all([req.session.checkpoint(), req.session.checkpoint()]);
      await req.session.checkpoint();
      await Promise.all([req.session.checkpoint().then(() => insert(req.session, 'b')), req.session.checkpoint()]);
      res.end();
    });

    expect(answer.status).toBe(200);
    expect(ends()).toHaveLength(4);
    expect(await bench.stored()).toEqual(['a', 'b']);
  });

  it('stores statements that were issued before it and not awaited, and refuses those that come while it is under way', async () => {
    let late: Promise<unknown> | undefined;
    await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      const [b, c] = [insert(req.session, 'b').then(() => 'b'), insert(req.session, 'c').then(() => 'c')];
      bench.proxy.onFrontend((message) => {
        if (isSql(message, 'COMMIT;')) late ??= caught(insert(req.session, 'late'));
      });
      await req.session.checkpoint();
      expect(await Promise.all([b, c])).toEqual(['b', 'c']);
      await insert(req.session, 'd');
      res.end();
    });

    expect(await late).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('checkpoint() is under way') });
    expect(await bench.stored()).toEqual(['a', 'b', 'c', 'd']);
  });

  it('fails a stream of rows that is being read: nobody takes the part for the whole', async () => {
    const rows: number[] = [];
    const read = withSession(bench.knex, async (session) => {
      for await (const { n } of session.raw('select generate_series(1, 1000) as n').stream()) {
        rows.push(n);
        if (n === 3) await session.checkpoint();
      }
    });
    expect(await caught(read)).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('checkpoint()') });
    expect(rows).toEqual([1, 2, 3]);
  });

  it('does not settle executionPromise: that is for the end', async () => {
    const seen: unknown[] = [];
    await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      void req.session.executionPromise.then(async () => seen.push(await bench.stored()));
      await req.session.checkpoint();
      await insert(req.session, 'b');
      seen.push('handler');
      res.end();
    });
    await eventually(() => expect(seen).toEqual(['handler', ['a', 'b']]));
  });
});

describe('when checkpoint() cannot commit', () => {
  const doomed: [string, string, (session: Session) => unknown][] = [
    ['a deferred constraint', '23505', (session) => session('items').insert([{ name: 'a' }, { name: 'a' }])],
    ['a swallowed error', 'ERR_TRANSACTION_ABORTED', (session) => caught(insert(session, 'bad'))],
    [
      'a lost answer to COMMIT',
      'ERR_COMMIT_UNKNOWN',
      () => bench.proxy.onFrontend((message) => (isSql(message, 'COMMIT;') ? 'cut-before' : undefined)),
    ],
    ['a beforeCommit hook', 'hook', (session) => session.beforeCommit(() => Promise.reject(Object.assign(new Error(), { code: 'hook' })))],
    ['a savepoint that is open', 'ERR_SAVEPOINT_OPEN', (session) => session.transaction()],
  ];

  it.each(doomed)('rejects, and ends the session: %s', async (_name, code, doom) => {
    const codes: string[] = [];
    const answer = await bench.answer(async (req, res) => {
      await req.session.raw('select 1');
      await doom(req.session);
      for (const attempt of [req.session.checkpoint(), req.session.checkpoint()]) codes.push((await caught(attempt)).code);
      codes.push((await caught(insert(req.session, 'late'))).code, req.session.outcome);
      codes.push((await caught(req.session.checkpoint())).code);
      // It was swallowed: no success can come of it.
      res.status(201).end();
    });

    expect(answer.status).toBe(500);
    expect(codes).toEqual([code, code, 'ERR_SESSION_CLOSED', code === 'ERR_COMMIT_UNKNOWN' ? 'unknown' : 'rolled back', code]);
    expect(bench.errors).toMatchObject([{ code }]);
    expect(await bench.stored()).toEqual([]);
  });

  it('refuses it after setRollbackOnly(), and on a savepoint, and sends no COMMIT', async () => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      await req.session.transaction(async (savepoint) => {
        expect(await caught((savepoint as Session).checkpoint())).toMatchObject({ code: 'ERR_SAVEPOINT_OPEN' });
        await insert(savepoint, 'b');
      });
      req.session.setRollbackOnly(failure);
      expect(await caught(req.session.checkpoint())).toMatchObject({ code: 'ERR_ROLLBACK_ONLY', cause: failure });
      await insert(req.session, 'c');
      res.end();
    });

    expect([answer.status, await bench.stored()]).toEqual([200, []]);
    expect(ends().at(-1)).toBe('ROLLBACK');
    expect(ends()).not.toContain('COMMIT;');
  });

  it.each<[string, (session: Session) => Promise<unknown>]>([
    ['commit()', (session) => session.commit()],
    ['rollback()', (session) => session.rollback()],
  ])('never reopens a session that has ended: %s', async (_name, end) => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      await end(req.session);
      for (const attempt of [() => req.session.checkpoint(), () => insert(req.session, 'late')]) {
        expect(await caught(attempt())).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
      }
      res.end();
    });
    expect(answer.status).toBe(200);
    expect(await bench.stored()).not.toContain('late');
  });
});

describe('when the session ends while checkpoint() is under way', () => {
  it.each<[string, Handler]>([
    ['the response ends', (_, res) => res.end()],
    ['the first byte leaves', (_, res) => res.write('x')],
    ['commit() is called', (req) => void req.session.commit()],
  ])('commits once, and nothing begins after it: %s', async (_name, end) => {
    const { promise, resolve } = deferred<unknown>();
    const answer = await bench.answer(async (req, res, next) => {
      await insert(req.session, 'a');
      const checkpoint = req.session.checkpoint();
      end(req, res, next);
      await checkpoint;
      resolve((await caught(insert(req.session, 'late'))).code);
      res.end();
    });

    expect([answer.status, await promise]).toEqual([200, 'ERR_SESSION_CLOSED']);
    expect([await bench.stored(), poolUsage(bench.knex).used]).toEqual([['a'], 0]);
  });

  it('keeps what it has committed if an error comes meanwhile, which is answered', async () => {
    const answer = await bench.answer(async (req) => {
      await insert(req.session, 'a');
      const committing = deferred();
      bench.proxy.onFrontend((message) => (isSql(message, 'COMMIT;') ? committing.resolve() : undefined));
      void req.session.checkpoint();
      await committing.promise;
      throw failure;
    });
    expect([answer.status, bench.errors, await bench.stored()]).toEqual([500, [failure], ['a']]);
  });

  it('begins nothing after the end of withSession()', async () => {
    let late: Promise<unknown> | undefined;
    await withSession(bench.knex, async (session) => {
      await insert(session, 'a');
      late = caught(session.checkpoint().then(() => insert(session, 'late')));
    });
    expect(await late).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    expect(poolUsage(bench.knex).used).toBe(0);
  });
});
