import type { Session } from 'express-knex-session';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred, useBench } from './support/wire';

failOnWarnings();

/** What became of work that nobody awaited: filled in when it has ended. */
class Fate {
  readonly ended = deferred<unknown>();

  of(work: PromiseLike<unknown>): void {
    work.then(
      () => this.ended.resolve('done'),
      (error) => this.ended.resolve(error),
    );
  }
}

const insert = (session: Session, name: string) => session('items').insert({ name });
const closed = expect.objectContaining({ code: 'ERR_SESSION_CLOSED' });

describe('when a statement is not awaited', () => {
  const bench = useBench();
  /** Runs a request that stores 'awaited', fires the work without awaiting it, and ends in the same tick. */
  async function fire(work: (session: Session) => PromiseLike<unknown>): Promise<unknown> {
    const fate = new Fate();
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'awaited');
      fate.of(work(req.session));
      res.status(201).end();
    });
    expect(answer.status).toBe(201);
    return fate.ended.promise;
  }

  it('stores one that was fired in the same tick as the end (hazard 22)', async () => {
    expect(await fire((session) => insert(session, 'a'))).toBe('done');
    expect(await bench.stored()).toEqual(['awaited', 'a']);
  });

  it('stores ten of them', async () => {
    const names = Array.from({ length: 10 }, (_, i) => `${i}`);
    expect(await fire((session) => Promise.all(names.map((name) => insert(session, name))))).toBe('done');
    expect(await bench.stored()).toEqual(['awaited', ...names]);
  });

  it('stores one that was fired a microtask later', async () => {
    const end = await fire(async (session) => {
      await null;
      await insert(session, 'a');
    });
    expect(end).toBe('done');
    expect(await bench.stored()).toEqual(['awaited', 'a']);
  });

  it('waits for a slow one', async () => {
    expect(await fire((session) => session.raw("with slow as (select pg_sleep(0.1)) insert into items (name) select 'a' from slow"))).toBe(
      'done',
    );
    expect(await bench.stored()).toEqual(['awaited', 'a']);
  });

  it('refuses by name what comes after an answer of the database: its first step is stored, the second one knows', async () => {
    const end = await fire(async (session) => {
      await session.raw("with slow as (select pg_sleep(0.1)) insert into items (name) select 'a' from slow");
      await insert(session, 'b');
    });
    expect(end).toEqual(closed);
    expect(await bench.stored()).toEqual(['awaited', 'a']);
  });

  it('refuses one that is fired after the response, by name', async () => {
    let session!: Session;
    await bench.answer(async (req, res) => {
      session = req.session;
      await insert(session, 'awaited');
      res.end();
    });
    await expect(insert(session, 'late')).rejects.toEqual(closed);
    await expect(session.raw('select 1')).rejects.toEqual(closed);
    await expect(session.schema.hasTable('items')).rejects.toEqual(closed);
    await expect(session.transaction(async () => {})).rejects.toEqual(closed);
    expect(await bench.stored()).toEqual(['awaited']);
    expect(bench.proxy.sql().at(-1)).toBe('COMMIT;');
  });

  it('rolls back, and names it, if one fails', async () => {
    const fate = new Fate();
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'awaited');
      fate.of(insert(req.session, 'bad'));
      res.status(201).end();
    });
    const error = await fate.ended.promise;
    expect(error).toMatchObject({ code: '23514' });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: 'ERR_TRANSACTION_ABORTED', cause: error }]);
    expect(await bench.stored()).toEqual([]);
  });

  it('drains one before ROLLBACK, and stores nothing of it', async () => {
    const fate = new Fate();
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'awaited');
      fate.of(insert(req.session, 'a'));
      res.status(409).end();
    });
    await fate.ended.promise;
    expect(answer.status).toBe(409);
    expect(bench.proxy.sql().at(-1)).toBe('ROLLBACK');
    expect(await bench.stored()).toEqual([]);
  });

  describe('and it is a stream', () => {
    it('does not wait for one that nobody reads', async () => {
      const answer = await bench.answer(async (req, res) => {
        await insert(req.session, 'awaited');
        req.session.raw('select n from generate_series(1, 100000) n').stream();
        res.end();
      });
      expect(answer.status).toBe(200);
      expect(await bench.stored()).toEqual(['awaited']);
    });

    it('does not wait for two of them', async () => {
      const answer = await bench.answer(async (req, res) => {
        await insert(req.session, 'awaited');
        req.session.raw('select n from generate_series(1, 100000) n').stream();
        req.session.raw('select n from generate_series(1, 100000) n').stream();
        res.end();
      });
      expect(answer.status).toBe(200);
      expect(await bench.stored()).toEqual(['awaited']);
    });

    it('does not wait for two of them, nor die of them, when it is rolled back', async () => {
      const answer = await bench.answer(async (req, res) => {
        await insert(req.session, 'awaited');
        req.session.raw('select n from generate_series(1, 100000) n').stream();
        req.session.raw('select n from generate_series(1, 100000) n').stream();
        res.sendStatus(409);
      });
      expect(answer.status).toBe(409);
      expect(await bench.stored()).toEqual([]);
    });

    it('tells one that is being read why it ends early', async () => {
      const fate = new Fate();
      const answer = await bench.answer(async (req, res) => {
        await insert(req.session, 'awaited');
        const rows = req.session.raw('select n from generate_series(1, 100000) n').stream({ batchSize: 10 });
        const begun = deferred();
        const read = async () => {
          for await (const _ of rows) begun.resolve();
        };
        fate.of(read());
        await begun.promise;
        res.end();
      });
      expect(answer.status).toBe(200);
      expect(await fate.ended.promise).toEqual(closed);
      expect(await bench.stored()).toEqual(['awaited']);
    });

    it('runs a statement that waits behind it', async () => {
      const fate = new Fate();
      await bench.answer(async (req, res) => {
        await insert(req.session, 'awaited');
        req.session.raw('select n from generate_series(1, 100000) n').stream();
        fate.of(insert(req.session, 'behind'));
        res.end();
      });
      expect(await fate.ended.promise).toBe('done');
      expect(await bench.stored()).toEqual(['awaited', 'behind']);
    });
  });

  describe('and it is a savepoint', () => {
    it('answers 500, by name, and stores nothing of the request', async () => {
      const fate = new Fate();
      const answer = await bench.answer(async (req, res) => {
        await insert(req.session, 'awaited');
        fate.of(
          req.session.transaction(async (trx) => {
            await insert(trx as Session, 'a');
            await insert(trx as Session, 'b');
          }),
        );
        res.status(201).end();
      });
      expect(await fate.ended.promise).toEqual(closed);
      expect(answer.status).toBe(500);
      expect(bench.errors).toMatchObject([{ code: 'ERR_SAVEPOINT_OPEN' }]);
      expect(await bench.stored()).toEqual([]);
    });

    it('answers 500, by name, and stores nothing, if it is half done', async () => {
      const fate = new Fate();
      const answer = await bench.answer(async (req, res) => {
        await insert(req.session, 'awaited');
        const isHalfDone = deferred();
        fate.of(
          req.session.transaction(async (trx) => {
            await insert(trx as Session, 'a');
            isHalfDone.resolve();
            await new Promise(setImmediate);
            await insert(trx as Session, 'b');
          }),
        );
        await isHalfDone.promise;
        res.status(201).end();
      });
      expect(await fate.ended.promise).toEqual(closed);
      expect(answer.status).toBe(500);
      expect(bench.errors).toMatchObject([{ code: 'ERR_SAVEPOINT_OPEN' }]);
      expect(await bench.stored()).toEqual([]);
    });
  });
});

describe('when the first statement is not awaited', () => {
  const bench = useBench({ pool: { min: 0, max: 1 } });

  it('begins and commits all the same', async () => {
    const fate = new Fate();
    const answer = await bench.answer((req, res) => {
      fate.of(insert(req.session, 'a'));
      res.status(201).end();
    });
    expect(answer.status).toBe(201);
    expect(await fate.ended.promise).toBe('done');
    expect(await bench.stored()).toEqual(['a']);
  });

  it('is refused by name if it comes a microtask after the end: the response has gone', async () => {
    const fate = new Fate();
    const answer = await bench.answer((req, res) => {
      fate.of(Promise.resolve().then(() => insert(req.session, 'a')));
      res.status(201).end();
    });
    expect(answer.status).toBe(201);
    expect(await fate.ended.promise).toEqual(closed);
    expect(bench.proxy.frontend).toEqual([]);
  });

  describe('while the pool is full', () => {
    /** Runs a request while another one holds the only connection. */
    async function whileFull(handler: (session: Session) => void): Promise<{ status: number }> {
      const mayEnd = deferred();
      const holds = deferred();
      const holder = bench.answer(async (req, res) => {
        await req.session.select(1);
        holds.resolve();
        await mayEnd.promise;
        res.end();
      });
      await holds.promise;
      const waits = deferred();
      const waiter = bench.answer((req, res) => {
        handler(req.session);
        res.status(201).end();
        waits.resolve();
      });
      await waits.promise;
      await eventually(() => expect(poolUsage(bench.knex)).toMatchObject({ used: 1, pendingAcquires: 1 }));
      mayEnd.resolve();
      await holder;
      return waiter;
    }

    it('waits for its connection, and stores it before the response leaves', async () => {
      const fate = new Fate();
      const answer = await whileFull((session) => fate.of(insert(session, 'a')));
      expect(answer.status).toBe(201);
      expect(await fate.ended.promise).toBe('done');
      expect(await bench.stored()).toEqual(['a']);
    });

    it('stores all of several', async () => {
      const fate = new Fate();
      const answer = await whileFull((session) => fate.of(Promise.all(['a', 'b', 'c'].map((name) => insert(session, name).then()))));
      expect(answer.status).toBe(201);
      expect(await fate.ended.promise).toBe('done');
      expect(await bench.stored()).toEqual(['a', 'b', 'c']);
    });

    it('does not wait for ever for a stream that nobody reads', async () => {
      const answer = await whileFull((session) => {
        session.raw('select n from generate_series(1, 100000) n').stream();
      });
      expect(answer.status).toBe(201);
    });
  });
});
