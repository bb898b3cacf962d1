import { getSession, type SessionOptions, sessionMiddleware, sessionOptions, withSession } from 'express-knex-session';
import { request } from './support/http';
import { caught } from './support/knex';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred, type Handler, isSql, useBench } from './support/wire';

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

describe('when a transaction is read-only', () => {
  const settleTimeout = 150;
  const bench = useBench({ pool: { min: 0, max: 1 } }, { readOnly: true, settleTimeout });
  const read: Handler = async (req, res) => res.json(await req.session('items'));
  let held = deferred();
  // The server would wait for it, and the next test for the server.
  afterEach(() => held.resolve());
  /** COMMIT stays on its way until it is let go. */
  const holdCommit = () => {
    held = deferred();
    const reached = deferred();
    bench.proxy.onFrontend((message) => {
      if (!isSql(message, 'COMMIT;')) return undefined;
      reached.resolve();
      return held.promise;
    });
    return { reached: reached.promise, release: () => held.resolve() };
  };

  it('answers after as many round trips as plain Knex: one; the connection goes back when COMMIT is answered, clean', async () => {
    await bench.knex('items');
    const ofKnex = bench.proxy.roundTrips();
    bench.proxy.reset();
    const commit = holdCommit();
    expect((await bench.answer(read)).status).toBe(200);
    expect([bench.proxy.roundTrips(), ofKnex]).toEqual([1, 1]);
    await commit.reached;
    expect(poolUsage(bench.knex)).toMatchObject({ used: 1 });
    commit.release();
    await bench.rest();
    expect(poolUsage(bench.knex)).toMatchObject({ used: 0, free: 1 });
    expect(await bench.knex.raw('select now() = statement_timestamp() as autocommits')).toMatchObject({ rows: [{ autocommits: true }] });
    expect(bench.proxy.connections()).toBe(1);
  });

  it('serves a crowd on one connection', async () => {
    const url = bench.route(read);
    const answers = await Promise.all(Array.from({ length: 60 }, () => request(url)));
    expect(new Set(answers.map(({ status }) => status))).toEqual(new Set([200]));
    await bench.rest();
    expect(bench.proxy.connections()).toBe(1);
    expect(bench.proxy.sql().filter((sql) => sql === 'COMMIT;')).toHaveLength(60);
  });

  it('destroys a connection whose COMMIT is never answered, within settleTimeout; the next request has another one', async () => {
    holdCommit();
    const begun = performance.now();
    expect((await bench.answer(read)).status).toBe(200);
    expect(performance.now() - begun).toBeLessThan(settleTimeout);
    bench.proxy.onFrontend(undefined);
    expect((await bench.answer(read)).status).toBe(200);
    expect(performance.now() - begun).toBeGreaterThanOrEqual(settleTimeout - 5);
    await bench.rest();
    expect(new Set(bench.proxy.frontend.map(({ connection }) => connection)).size).toBe(2);
  });

  it.each(['cut-before', 'cut-after'] as const)('lets the read go, and the connection, if COMMIT is lost: %s', async (how) => {
    bench.proxy.onFrontend((message) => (isSql(message, 'COMMIT;') ? how : undefined));
    expect((await bench.answer(read)).status).toBe(200);
    bench.proxy.onFrontend(undefined);
    expect((await bench.answer(read)).status).toBe(200);
  });

  it.each<[string, SessionOptions, string | undefined]>([
    ['SERIALIZABLE by its options', { isolationLevel: 'serializable' }, undefined],
    ['SERIALIZABLE by its first statement', {}, 'set transaction isolation level serializable'],
    ['not read-only on this route', { readOnly: false }, undefined],
  ])('waits for the answer if it is %s', async (_case, options, first) => {
    bench.proxy.onFrontend((message) => (isSql(message, 'COMMIT;') ? 'cut-before' : undefined));
    const handler: Handler = async (req, res, next) => {
      if (first) await req.session.raw(first);
      return read(req, res, next);
    };
    expect((await bench.answer(under(options, handler))).status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: 'ERR_COMMIT_UNKNOWN' }]);
  });

  it('still refuses a success after an error that was swallowed', async () => {
    const answer = await bench.answer(async (req, res) => {
      await caught(req.session('nowhere'));
      res.json('fine');
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: 'ERR_TRANSACTION_ABORTED', cause: { code: '42P01' } }]);
  });

  it('lets hooks and what follows a checkpoint have the one connection, when it is back', async () => {
    const seen: unknown[] = [];
    const answer = await bench.answer(async (req, res) => {
      req.session.afterCommit(async (session) => seen.push((await session('items')).length));
      await req.session('items');
      await req.session.checkpoint();
      seen.push(req.session.outcome, (await req.session('items')).length);
      res.end();
    });
    expect(answer.status).toBe(200);
    expect(seen).toEqual([0, 'committed', 0]);
  });

  it('is as quick outside of requests', async () => {
    const commit = holdCommit();
    await withSession(bench.knex, (session) => session('items'), { readOnly: true, settleTimeout });
    await commit.reached;
    expect(poolUsage(bench.knex)).toMatchObject({ used: 1 });
    commit.release();
  });

  it('is waited for by drain(), and counted once', async () => {
    const sessions = sessionMiddleware(bench.knex, { property: 'db', readOnly: true, settleTimeout: 2_000 });
    const commit = holdCommit();
    const handler: Handler = (req, res, next) =>
      sessions(req, res, (error?: unknown) => (error ? next(error) : getSession(req, 'db')('items').then((rows) => res.json(rows), next)));
    expect((await bench.answer(handler)).status).toBe(200);
    expect(sessions.stats()).toMatchObject({ open: 1, committed: 0 });
    let isDrained = false;
    const drained = sessions.drain(0).then(() => {
      isDrained = true;
    });
    await commit.reached;
    await new Promise(setImmediate);
    expect(isDrained).toBe(false);
    commit.release();
    await drained;
    expect(poolUsage(bench.knex)).toMatchObject({ used: 0, free: 1 });
    expect(sessions.stats()).toMatchObject({ open: 0, committed: 1 });
  });
});
