import type { Request } from 'express';
import { type Session, sessionMiddleware, withSession } from 'express-knex-session';
import { type Answer, get } from './support/http';
import { flavours, insert, useLedger } from './support/ledger';
import { poolUsage } from './support/pool';
import { retrying, store, transient, type Work } from './support/retrying';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const ledger = useLedger();

const serve = retrying(ledger);

/** Where two meet; who comes later passes. */
function barrier(): () => Promise<void> {
  const met = deferred();
  let count = 0;
  return () => {
    if (++count === 2) met.resolve();
    return met.promise;
  };
}

const pair = (url: string): Promise<Answer[]> => Promise.all(['a', 'b'].map((who) => get(`${url}/${who}`)));

/** Changes what another transaction has changed since this one began: 40001, in an attempt that is the first. */
async function change(session: Session, attempt: number): Promise<void> {
  await session('notes').select();
  if (attempt === 1) await ledger.database.admin('notes').where({ id: 'row' }).update({ at_commit: null });
  await session('notes').where({ id: 'row' }).update({ at_commit: null });
}

describe.each(flavours)('on $version', (flavour) => {
  describe('when two requests conflict', () => {
    it('serves both after a write skew, as if one had come after the other, each with one effect (57)', async () => {
      const bothHaveRead = barrier();
      const site = await serve(
        async (req, res) => {
          const notes = await req.session('notes').select();
          await bothHaveRead();
          await insert(req, `number ${notes.length + 1}`);
          res.status(201).end();
        },
        { flavour, isolationLevel: 'serializable' },
      );
      expect((await pair(site.url)).map(({ status }) => status)).toEqual([201, 201]);
      expect(await ledger.stored()).toEqual(['number 1', 'number 2']);
      expect(site.ran('/a') + site.ran('/b')).toBe(3);
      expect(site.sessions.stats()).toMatchObject({ committed: 2, rolledBack: 1, unknown: 0, open: 0, waiting: 0 });
    });

    it('serves both after a deadlock, each with one effect (57)', async () => {
      await ledger.database.admin('notes').insert([{ id: 'a' }, { id: 'b' }]);
      const bothHaveLocked = barrier();
      const site = await serve(
        async (req, res, _next, attempt) => {
          const [, own] = req.path;
          for (const id of own === 'a' ? ['a', 'b'] : ['b', 'a']) {
            await req.session('notes').where({ id }).update({ at_commit: null });
            await bothHaveLocked();
          }
          await insert(req, `${own} has both ${'!'.repeat(attempt)}`);
          res.status(201).end();
        },
        { flavour, isolationLevel: 'serializable', settings: { deadlock_timeout: '20ms' } },
      );
      expect((await pair(site.url)).map(({ status }) => status)).toEqual([201, 201]);
      const stored = (await ledger.stored()).map((id) => id.replace(/ !+/, ''));
      expect(stored).toEqual(['a', 'a has both', 'b', 'b has both']);
      expect(site.ran('/a') + site.ran('/b')).toBeGreaterThan(2);
      expect([...site.errors, ...site.reported]).toEqual([]);
    });
  });

  describe('when an attempt has failed for the sake of another transaction', () => {
    const ways: Record<string, Work> = {
      'at a statement': async (req, res, _next, attempt) => {
        await store(req, attempt);
        await change(req.session, attempt);
        res.status(201).end();
      },
      'at COMMIT': async (req, res, _next, attempt) => {
        await insert(req, `stored by ${attempt}`, attempt === 1 ? 'conflict' : undefined);
        res.status(201).end();
      },
      'in a savepoint': async (req, res, _next, attempt) => {
        await store(req, attempt);
        await req.session.transaction((trx) => change(trx as Session, attempt));
        res.status(201).end();
      },
      'as the cause of its own error': async (req, res, _next, attempt) => {
        await store(req, attempt);
        await change(req.session, attempt).catch((cause) => {
          throw new Error('transfer failed', { cause });
        });
        res.status(201).end();
      },
      'and it was swallowed, and a success sent': async (req, res, _next, attempt) => {
        await store(req, attempt);
        await change(req.session, attempt).catch(() => {});
        res.status(201).end();
      },
      'and it passed that on with next(error)': async (req, res, next, attempt) => {
        try {
          await store(req, attempt);
          await change(req.session, attempt);
          res.status(201).end();
        } catch (error) {
          next(error);
        }
      },
      'and it passed that on, and threw it as well': async (req, res, next, attempt) => {
        await store(req, attempt);
        await change(req.session, attempt).catch((error) => {
          next(error);
          throw error;
        });
        res.status(201).end();
      },
      'and it passed that on, and sent a success all the same': async (req, res, next, attempt) => {
        await store(req, attempt);
        await change(req.session, attempt).catch(next);
        res.status(201).end();
      },
      'in another unit of work, and this one is sound, of which a success was sent': async (req, res, next, attempt) => {
        await store(req, attempt);
        await withSession(ledger.knex, (session) => change(session, attempt), { isolationLevel: 'serializable' }).catch(next);
        res.status(201).end();
      },
      'and it is synchronous, and throws': (req, res, next, attempt) => {
        if (attempt === 1) throw transient();
        store(req, attempt).then(() => res.status(201).end(), next);
      },
      'and it is synchronous, and passes each error on': (req, res, next, attempt) => {
        const all = [store(req, attempt).then(), change(req.session, attempt), req.session('notes').select().then()];
        for (const each of all) each.catch(next);
        Promise.all(all).then(
          () => res.status(201).end(),
          () => {},
        );
      },
      'and it answers later, from a callback': (req, res, next, attempt) => {
        insert(req, `stored by ${attempt}`, attempt === 1 ? 'conflict' : undefined).then(
          () => setImmediate(() => res.status(201).end()),
          next,
        );
      },
      'in a beforeCommit hook': async (req, res, _next, attempt) => {
        await store(req, attempt);
        await req.session('notes').select();
        req.session.beforeCommit((session) => change(session, attempt));
        res.status(201).end();
      },
      'at commit() by hand': async (req, res, _next, attempt) => {
        await insert(req, `stored by ${attempt}`, attempt === 1 ? 'conflict' : undefined);
        await req.session.commit();
        res.status(201).end();
      },
    };
    it.each(Object.entries(ways))('runs the handler again, which has the only effect: %s (57)', async (_name, work) => {
      await ledger.database.admin('notes').insert({ id: 'row' });
      const site = await serve(work, { flavour, isolationLevel: 'serializable' });
      expect(await site.get()).toMatchObject({ status: 201, complete: true });
      expect(await ledger.stored()).toEqual(['row', 'stored by 2']);
      expect(site.ran()).toBe(2);
      await ledger.isClean();
      expect([...site.errors, ...site.reported]).toEqual([]);
      expect(site.sessions.stats()).toMatchObject({ open: 0, waiting: 0, committed: 1, unknown: 0 });
    });
  });
});

describe('when hooks were registered', () => {
  const failures: [string, Work][] = [
    ['by an error', async () => Promise.reject(transient())],
    ['at COMMIT', async (req, res, _next, attempt) => void res.json(await insert(req, `refused ${attempt}`, 'conflict'))],
  ];
  const register = (req: Request, ran: string[], attempt: number): void => {
    for (const kind of ['afterRollback', 'afterCommit'] as const) req.session[kind](() => ran.push(`${kind} ${attempt}`));
  };

  it.each(failures)('does not run those of attempts that have failed %s, and once those of the last (62)', async (_name, fail) => {
    const ran: string[] = [];
    const site = await serve(async (req, res, next, attempt) => {
      await store(req, attempt);
      req.session.beforeCommit(() => ran.push(`beforeCommit ${attempt}`));
      register(req, ran, attempt);
      await req.session.transaction(async () => register(req, ran, attempt));
      if (attempt < 3) await fail(req, res, next, attempt);
      else res.end();
    });
    expect(await site.get()).toMatchObject({ status: 200 });
    const after = ran.filter((hook) => !hook.startsWith('before'));
    expect(after).toEqual(['afterCommit 3', 'afterCommit 3']);
    expect(await ledger.stored()).toEqual(['stored by 3']);
    expect(site.sessions.stats()).toMatchObject({ committed: 1, rolledBack: 2 });
  });

  it.each(failures)('runs afterRollback of the last attempt only, if that has failed %s too (59, 62)', async (_name, fail) => {
    const ran: string[] = [];
    const site = await serve(async (req, res, next, attempt) => {
      await store(req, attempt);
      register(req, ran, attempt);
      await fail(req, res, next, attempt);
    });
    expect(await site.get()).toMatchObject({ status: 500 });
    expect(ran).toEqual(['afterRollback 3']);
    expect(site.errors).toEqual([expect.objectContaining({ code: '40001' })]);
  });

  it('does not run those of another session of the request, which was rolled back with it', async () => {
    const ran: string[] = [];
    const another = sessionMiddleware(ledger.knex, { property: 'db' });
    const site = await serve(
      async (req, res, _next, attempt) => {
        const { db } = req as unknown as { db: Session };
        await insert(req, `stored by ${attempt}`, attempt === 1 ? 'conflict' : undefined);
        await db('notes').insert({ id: `and in attempt ${attempt}` });
        db.afterRollback(() => ran.push(`afterRollback ${attempt}`));
        db.afterCommit(() => ran.push(`afterCommit ${attempt}`));
        res.end();
      },
      { before: [another] },
    );
    expect(await site.get()).toMatchObject({ status: 200 });
    expect(ran).toEqual(['afterCommit 2']);
    expect(await ledger.stored()).toEqual(['and in attempt 2', 'stored by 2']);
    expect(another.stats()).toMatchObject({ committed: 1, rolledBack: 1, open: 0 });
  });
});

describe('when 12 clients move money between 5 accounts, over a pool of 4', () => {
  it('keeps the sum; each 2xx is stored once, everything else not at all, and no connection is held (57, 59)', async () => {
    const { admin } = ledger.database;
    await admin.raw('CREATE TABLE accounts (id integer PRIMARY KEY, balance integer NOT NULL CHECK (balance >= 0))');
    await admin('accounts').insert([1, 2, 3, 4, 5].map((id) => ({ id, balance: 100 })));
    const knex = ledger.pool({ pool: { min: 0, max: 4 } });
    const random = seeded(20261121);
    const site = await serve(
      async (req, res) => {
        const [from, to, amount, end] = ['from', 'to', 'amount', 'end'].map((name) => Number(req.query[name])) as [
          number,
          number,
          number,
          number,
        ];
        const balances = await req.session('accounts').whereIn('id', [from, to]);
        const source = balances.find(({ id }) => id === from);
        const target = balances.find(({ id }) => id === to);
        // By values that were read: a lost update would make money.
        await req
          .session('accounts')
          .where({ id: from })
          .update({ balance: source.balance - amount });
        await req
          .session('accounts')
          .where({ id: to })
          .update({ balance: target.balance + amount });
        await insert(req, req.path);
        if (end === 0) throw new Error('the application has failed');
        if (end === 1) res.status(422).json({});
        else if (end === 2) res.write('transferred');
        if (!res.writableEnded) res.end();
      },
      { knex, isolationLevel: 'serializable', attempts: 5 },
    );
    const answers = new Map<string, Answer>();
    let count = 0;
    const client = async (): Promise<void> => {
      while (count < 96) {
        const path = `/transfer-${count++}`;
        const from = 1 + Math.floor(random() * 5);
        const to = 1 + ((from + Math.floor(random() * 4)) % 5);
        const query = `from=${from}&to=${to}&amount=${Math.ceil(random() * 30)}&end=${Math.floor(random() * 8)}`;
        answers.set(path, await get(`${site.url}${path}?${query}`, { signal: AbortSignal.timeout(30_000) }));
      }
    };
    await Promise.all(Array.from({ length: 12 }, client));

    const paths = [...answers.keys()];
    const acknowledged = paths.filter((path) => answers.get(path)?.status === 200);
    expect([...(await ledger.stored())].sort()).toEqual(acknowledged.sort());
    expect(await admin('accounts').sum('balance').first()).toEqual({ sum: '500' });
    expect([...answers.values()].filter(({ complete }) => !complete)).toEqual([]);
    // It has been a storm, and most have come through it.
    expect(paths.filter((path) => site.ran(path) > 1).length).toBeGreaterThan(8);
    expect(acknowledged.length).toBeGreaterThan(30);
    const codes = new Set(site.errors.map(({ code, message }) => code ?? message));
    expect([...codes].filter((code) => !['40001', '40P01', '23514', 'the application has failed'].includes(code))).toEqual([]);
    expect(site.sessions.stats()).toMatchObject({ open: 0, waiting: 0, committed: acknowledged.length, unknown: 0 });
    expect(poolUsage(knex)).toMatchObject({ used: 0, pendingAcquires: 0 });
    await admin.raw('DROP TABLE accounts');
    // It takes 3 s, and many times that on a busy machine.
  }, 60_000);
});

/** Random numbers that are the same in each run (mulberry32). */
function seeded(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}
