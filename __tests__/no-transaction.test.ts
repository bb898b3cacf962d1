import { getSession, type Session, type SessionOptions, sessionMiddleware, sessionOptions } from 'express-knex-session';
import { request } from './support/http';
import { caught } from './support/knex';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred, type Handler, sent, useBench } from './support/wire';

failOnWarnings();

const under =
  (options: SessionOptions, handler: Handler): Handler =>
  async (req, res, next) => {
    let refused: unknown;
    sessionOptions(options)(req, res, (error) => {
      refused = error;
    });
    if (refused) throw refused;
    return handler(req, res, next);
  };

describe('when a route wants no transaction', () => {
  const bench = useBench({}, { acquireTimeout: 200 });
  const plain = (handler: Handler) => bench.answer(under({ transaction: false }, handler));
  /** What came of some work with such a session. */
  const outcomeOf = async (work: (session: Session) => unknown): Promise<any> => {
    let outcome: unknown;
    const answer = await plain(async (req, res) => {
      outcome = await Promise.resolve(work(req.session)).catch((error) => error);
      res.end();
    });
    expect(answer.status).toBe(200);
    return outcome;
  };
  const insert = (session: Session, name: string) => session('items').insert({ name });

  it('sends what plain Knex sends, in as many round trips', async () => {
    const read = (knex: Pick<Session, 'raw'> & ((table: string) => any)) => Promise.resolve(knex('items').where({ name: 'a' }));
    await read(bench.knex);
    const [messages, roundTrips] = [sent(bench.proxy), bench.proxy.roundTrips()];
    bench.proxy.reset();
    await plain(async (req, res) => res.json(await read(req.session)));
    expect([sent(bench.proxy), bench.proxy.roundTrips()]).toEqual([messages, roundTrips]);
    expect(roundTrips).toBe(1);
  });

  it('stores each statement by itself, whatever comes of the others and of the request', async () => {
    await plain(async (req, res) => insert(req.session, 'refused').then(() => res.status(409).end()));
    await plain(async (req) => {
      await insert(req.session, 'thrown');
      await insert(req.session, 'bad');
    });
    await plain(async (req, res) => {
      await caught(insert(req.session, 'bad'));
      await insert(req.session, 'swallowed');
      res.end();
    });
    expect(await bench.stored()).toEqual(['refused', 'thrown', 'swallowed']);
    expect(bench.errors).toMatchObject([{ code: '23514' }]);
  });

  it('runs statements that were issued together on several connections', async () => {
    const order: string[] = [];
    await outcomeOf(async (session) => {
      const blocker = await bench.database.admin.transaction();
      await blocker.raw('select pg_advisory_xact_lock(1)');
      const blocked = session.raw('select pg_advisory_xact_lock(1)').then(() => order.push('blocked'));
      await session.raw('select 1').then(() => order.push('free'));
      await blocker.commit();
      await blocked;
    });
    expect(order).toEqual(['free', 'blocked']);
  });

  it('has real transactions by transaction(), with savepoints, modes, and an isolation of their own', async () => {
    const seen = await outcomeOf(async (session) => {
      const seen: unknown[] = [];
      const failing = session.transaction(async (trx) => {
        await trx('items').insert({ name: 'lost' });
        seen.push((await session('items')).length);
        throw new Error('of the transaction');
      });
      seen.push((await caught(failing)).message);
      await session.transaction(async (trx) => {
        await trx('items').insert({ name: 'kept' });
        await caught(trx.transaction((savepoint) => savepoint('items').insert({ name: 'bad' })));
      });
      await session.batchInsert('items', [{ name: 'x' }, { name: 'y' }], 1);
      const readOnly = session.transaction((trx) => trx('items').insert({ name: 'lost' }), { readOnly: true });
      seen.push((await caught(readOnly)).code);
      return seen;
    });
    expect(seen).toEqual([0, 'of the transaction', '25006']);
    expect(await bench.stored()).toEqual(['kept', 'x', 'y']);
  });

  it.each<[string, (session: Session) => unknown]>([
    ['rollback', (session) => session.rollback()],
    ['setRollbackOnly', (session) => session.setRollbackOnly()],
    ['set', (session) => session.set({ 'app.tenant': 'a' })],
  ])('names %s(), whose promise it cannot keep, before and after a statement', async (name, call) => {
    const errors = await outcomeOf(async (session) => {
      await insert(session, 'a');
      return caught((async () => call(session))());
    });
    expect(errors).toMatchObject({ code: 'ERR_NO_TRANSACTION', message: expect.stringContaining(`session.${name}()`) });
    expect(await bench.stored()).toEqual(['a']);
  });

  it('ends with commit(), which has nothing to do', async () => {
    const late = await outcomeOf(async (session) => {
      await insert(session, 'a');
      await session.commit();
      return caught(insert(session, 'late'));
    });
    expect(late).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    expect(await bench.stored()).toEqual(['a']);
    expect(bench.proxy.roundTrips()).toBe(1);
  });

  it.each<[string, SessionOptions]>([
    ['settings', { settings: { 'app.tenant': 'a' } }],
    ['settings as a function', { settings: () => ({ 'app.tenant': 'a' }) }],
    ['a role', { role: 'app' }],
  ])('refuses every statement by name, with %s: they hold for a transaction', async (_what, options) => {
    const answer = await bench.answer(
      under({ transaction: false, ...options }, async (req) => {
        await caught(insert(req.session, 'a'));
        await insert(req.session, 'b');
      }),
    );
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: 'ERR_SESSION_OPTIONS' }]);
    expect(bench.proxy.sql()).toEqual([]);
  });

  it('streams, and takes the connection back from a stream that is not read to its end', async () => {
    const seen = await outcomeOf(async (session) => {
      const rows: unknown[] = [];
      for await (const { n } of session.raw('select n from generate_series(1, 3) n').stream()) rows.push(n);
      for await (const { n } of session.raw('select n from generate_series(1, 100000) n').stream()) {
        rows.push(n);
        break;
      }
      return [...rows, (await caught(session.raw('select 1 / 0').stream().toArray())).code];
    });
    expect(seen).toEqual([1, 2, 3, 1, '22012']);
  });

  it('works on after the response, as the pool does', async () => {
    const done = deferred<unknown>();
    await plain(async (req, res) => {
      res.json('sent');
      done.resolve(await caught(insert(req.session, 'a').then(() => insert(req.session, 'b'))));
    });
    expect(await done.promise).toBe('no error');
    expect(await bench.stored()).toEqual(['a', 'b']);
  });

  it('passes a lost connection on as an error, and takes another one', async () => {
    const error = await outcomeOf(async (session) => {
      const sleeping = caught(session.raw('select pg_sleep(5)'));
      await eventually(() => expect(poolUsage(bench.knex).used).toBe(1));
      await bench.terminate(bench.held());
      const error = await sleeping;
      await insert(session, 'a');
      return error;
    });
    expect(error).toBeInstanceOf(Error);
    expect(await bench.stored()).toEqual(['a']);
  });

  it('gives up waiting for a connection after acquireTimeout: 503', async () => {
    const all = await Promise.all([1, 2, 3, 4].map(() => bench.knex.client.acquireConnection()));
    const answer = await plain(async (req, res) => res.json(await req.session('items')));
    for (const connection of all) bench.knex.client.releaseConnection(connection);
    expect(answer.status).toBe(503);
    expect(bench.errors).toMatchObject([{ code: 'ERR_SESSION_UNAVAILABLE' }]);
  });

  it('refuses a raw BEGIN, which would leave a connection in a transaction', async () => {
    expect(await outcomeOf((session) => session.raw('BEGIN'))).toMatchObject({ code: 'ERR_TRANSACTION_CONTROL' });
    expect(bench.proxy.sql()).toEqual([]);
  });

  it('is a flag for the whole app, by request', async () => {
    const handlers = sessionMiddleware(bench.knex, { property: 'db', transaction: (req) => req.query['plain'] === undefined });
    const url = bench.route((req, res, next) =>
      handlers(req, res, async (error?: unknown) => {
        if (error) return next(error);
        await getSession(req, 'db')('items').insert({ name: String(req.query['plain']) });
        res.status(409).end();
      }),
    );
    await request(url);
    await request(`${url}?plain=stored`);
    expect(await bench.stored()).toEqual(['stored']);
  });
});

describe('when a statement without a transaction is given up by Knex', () => {
  const bench = useBench({ pool: { min: 0, max: 1 } });

  it('frees its slot in the pool at once, not when the server has done', async () => {
    const answer = await bench.answer(
      under({ transaction: false }, async (req, res) => {
        const begun = performance.now();
        await expect(req.session.raw('select pg_sleep(3)').timeout(30)).rejects.toThrow('timeout of 30ms');
        await req.session.raw('select 1');
        res.json(performance.now() - begun);
      }),
    );
    expect(Number(answer.body)).toBeLessThan(2_000);
  });
});
