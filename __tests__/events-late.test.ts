import { retryable, withSession } from 'express-knex-session';
import { openSite } from './support/deadlines';
import { useEvents } from './support/events';
import { RawClient } from './support/http';
import { flavours, type Handler, insert, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred, isSql, sent } from './support/wire';

failOnWarnings();
const ledger = useLedger();
const events = useEvents();

/** Serves one request, whose handler calls back what it does late; waits until that was refused. */
async function lateIn(first: Handler, late: Handler): Promise<unknown> {
  const refused = deferred<unknown>();
  const site = await openSite(ledger, async (req, res, next) => {
    await first(req, res, next);
    res.once('close', () => void Promise.resolve(late(req, res, next)).then(refused.resolve, refused.resolve));
    res.end();
  });
  await site.get();
  return refused.promise;
}

describe('when a session is used after its end', () => {
  describe.each(flavours)('on $version', (flavour) => {
    it('tells of a statement after the response, with what its caller was told', async () => {
      const refused = deferred<unknown>();
      let req!: Express.Request;
      const handler: Handler = async (request, res) => {
        req = request;
        await insert(request, 'a');
        res.once('close', () => void insert(request, 'secret').catch(refused.resolve));
        res.sendStatus(201);
      };
      await (await openSite(ledger, handler, { flavour })).get();
      const error = await refused.promise;
      expect(events.late()).toEqual([{ session: req.session, request: req, error }]);
      expect(error).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
      expect(await ledger.stored()).toEqual(['a']);
    });

    it('tells of a statement after the client has gone', async () => {
      const refused = deferred<unknown>();
      const handler: Handler = async (req) => {
        await insert(req, 'a');
        await req.session.raw('SELECT pg_sleep(10)').catch(() => {});
        await insert(req, 'secret').catch(refused.resolve);
      };
      const site = await openSite(ledger, handler, { flavour });
      const client = (await RawClient.connect(site.port)).get('/');
      await eventually(() => expect(events.told.at(-1)?.message).toMatchObject({ statements: 2 }));
      await client.reset();
      const error = await refused.promise;
      expect(events.late().map((message) => message.error)).toEqual([error]);
      expect(events.late()[0]?.request?.session).toBe(events.late()[0]?.session);
    });
  });

  const used: Handler = (req) => insert(req, 'a');
  const lateUses: [string, Handler, Handler][] = [
    ['a statement, without one before', () => {}, (req) => insert(req, 'b')],
    ['a stream', used, async (req) => void (await req.session('notes').stream().toArray())],
    ['a raw statement', used, (req) => req.session.raw('SELECT 1')],
    ['a savepoint', used, (req) => req.session.transaction(() => Promise.resolve())],
    ['a statement of a savepoint', used, (req) => req.session.transaction((trx) => trx('notes').insert({ id: 'b' }))],
  ];
  it.each(lateUses)('tells once of %s', async (_, first, late) => {
    const error = await lateIn(first, late);
    expect(error).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    expect(events.late().map((message) => message.error)).toEqual([error]);
  });

  const lateCalls: [string, Handler][] = [
    ['set()', (req) => req.session.set({ 'app.tenant': '1' })],
    ['setRollbackOnly()', async (req) => req.session.setRollbackOnly()],
    ['afterCommit()', async (req) => req.session.afterCommit(() => {})],
  ];
  it.each(lateCalls)('tells of %s, too', async (_, late) => {
    const error = await lateIn(used, late);
    expect(error).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    expect(events.late().map((message) => message.error)).toEqual([error]);
  });

  it('tells of commit(), in the handler, and a statement after it', async () => {
    let error: unknown;
    const site = await openSite(ledger, async (req, res) => {
      await insert(req, 'a');
      await req.session.commit();
      error = await insert(req, 'b').catch((refusal) => refusal);
      res.sendStatus(201);
    });
    expect(await site.get()).toMatchObject({ status: 201 });
    expect(events.late().map((message) => message.error)).toEqual([error]);
    expect(events.order()).toEqual(['acquire', 'open', 'settle', 'settled', 'late']);
  });

  it('tells of withSession(), without a request', async () => {
    let leaked: any;
    await withSession(ledger.knex, async (session) => {
      leaked = session;
      await session('notes').insert({ id: 'a' });
    });
    const error = await leaked('notes').catch((refusal: unknown) => refusal);
    expect(events.late()).toEqual([{ session: leaked, request: undefined, error }]);
  });

  it('tells of a straggler of an attempt that has failed', async () => {
    let attempts = 0;
    let straggler!: Promise<unknown>;
    const mayGoOn = deferred();
    const handler = retryable(async (req, res) => {
      const { session } = req;
      if (attempts++ === 0) straggler = mayGoOn.promise.then(() => session('notes').insert({ id: 'late' })).catch((error) => error);
      await insert(req, 'a', attempts === 1 ? 'conflict' : undefined);
      res.once('close', mayGoOn.resolve);
      res.sendStatus(201);
    });
    const site = await openSite(ledger, { routes: (app) => void app.get('/', handler) });
    expect(await site.get()).toMatchObject({ status: 201 });
    const error = await straggler;
    expect(events.late().map((message) => message.error)).toEqual([error]);
    expect(events.late()[0]?.session).toBe((await events.settled(2))[0]?.session);
  });
});

describe('what is asked in time is not late', () => {
  it('a statement that waits for the pool when the client leaves', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 } });
    const site = await openSite(ledger, (req) => Promise.all([insert(req, 'a'), insert(req, 'b')]), { knex });
    await knex.transaction(async (trx) => {
      await trx.raw('SELECT 1');
      const client = (await RawClient.connect(site.port)).get('/');
      await eventually(() => expect(poolUsage(knex).pendingAcquires).toBe(1));
      await client.reset();
      await events.settled();
    });
    expect(events.late().map((message) => message.error)).toEqual([]);
  });

  it('a statement that waits for its turn when the client leaves', async () => {
    let refused: any[] = [];
    const site = await openSite(ledger, async (req) => {
      const work = [req.session.raw('SELECT pg_sleep(10)'), insert(req, 'b'), insert(req, 'c')];
      refused = await Promise.all(work.map((one) => one.then(undefined, (error: unknown) => error)));
    });
    const client = (await RawClient.connect(site.port)).get('/');
    await eventually(() => expect(events.told.at(-1)?.message).toMatchObject({ statements: 1 }));
    await client.reset();
    await events.settled();
    await eventually(() => expect(refused).toHaveLength(3));
    expect(events.late().map((message) => message.error)).toEqual([]);
  });

  it('a statement that waits for its turn when another one has failed, and the handler', async () => {
    const site = await openSite(ledger, (req) => Promise.all([req.session.raw('SELECT 1/0'), insert(req, 'b'), insert(req, 'c')]));
    expect(await site.get()).toMatchObject({ status: 500 });
    await events.settled();
    expect(events.late().map((message) => message.error)).toEqual([]);
  });
});

describe('when a connection is destroyed', () => {
  const store: Handler = async (req, res) => {
    await insert(req, 'a');
    res.sendStatus(201);
  };

  it.each(flavours)('tells why, and for whom, if its backend was killed, on $version', async (flavour) => {
    const handler: Handler = async (req, res, next) => {
      await insert(req, 'first');
      await ledger.killBackend();
      return store(req, res, next);
    };
    const site = await openSite(ledger, handler, { flavour });
    expect(await site.get()).toMatchObject({ status: 500 });
    const [settled] = await events.settled();
    const { session, request } = settled as typeof settled & object;
    expect(events.destroyed()).toEqual([{ session, request, reason: expect.any(Error) }]);
    expect(events.destroyed()).toMatchObject([{ reason: { message: expect.stringMatching(/terminat/) } }]);
  });

  it('tells of a COMMIT that is not answered within settleTimeout', async () => {
    const { knex, proxy } = await ledger.throughProxy();
    const mayCommit = deferred();
    proxy.onFrontend((message) => (isSql(message, 'COMMIT;') ? mayCommit.promise : undefined));
    const site = await openSite(ledger, store, { knex, settleTimeout: 30 });
    expect(await site.get()).toMatchObject({ status: 500, body: expect.stringContaining('ERR_COMMIT_UNKNOWN') });
    expect(events.destroyed()).toEqual([
      expect.objectContaining({
        reason: expect.objectContaining({ message: expect.stringContaining('COMMIT was not answered within 30 ms') }),
      }),
    ]);
    expect(await events.settled()).toMatchObject([{ outcome: 'unknown', decision: 'commit' }]);
    expect((await events.settled())[0]?.heldMs).toBeGreaterThanOrEqual(29);
    mayCommit.resolve();
  });

  it('tells of a statement that Knex has given up', async () => {
    const site = await openSite(ledger, async (req) => req.session.raw('SELECT pg_sleep(0.1)').timeout(20));
    expect(await site.get()).toMatchObject({ status: 500 });
    expect(events.destroyed()).toMatchObject([{ reason: { name: 'KnexTimeoutError' } }]);
  });

  it('tells of drain(), which takes them with it', async () => {
    const site = await openSite(ledger, async (req) => req.session.raw('SELECT pg_sleep(10)'));
    const asked = site.get();
    await eventually(() => expect(events.told.at(-1)?.message).toMatchObject({ statements: 1 }));
    await site.sessions.drain(0);
    await asked;
    expect(events.destroyed()).toMatchObject([{ reason: { code: 'ERR_SESSION_UNAVAILABLE' } }]);
  });

  it('tells of a session without a transaction, too', async () => {
    const site = await openSite(ledger, async (req) => req.session.raw('SELECT pg_terminate_backend(pg_backend_pid())'), {
      transaction: false,
    });
    expect(await site.get()).toMatchObject({ status: 500 });
    await eventually(() => expect(events.order()).toEqual(['destroyed']));
    expect(events.destroyed()[0]?.request?.session).toBe(events.destroyed()[0]?.session);
  });

  it('tells of one that somebody else has left unclean: it is not used', async () => {
    const { knex, proxy } = await ledger.throughProxy({ pool: { min: 0, max: 1 } });
    await knex.raw('BEGIN');
    // One session must have been there for pg's before 8.21.
    const site = await openSite(ledger, store, { knex });
    expect(await site.get()).toMatchObject({ status: 201 });
    expect(sent(proxy)).toContain('COMMIT');
    await events.settled();
    expect(events.destroyed().length).toBeLessThanOrEqual(1);
  });

  it('tells nothing of those that are given back', async () => {
    const site = await openSite(ledger, async (req, res) => {
      await insert(req, 'a');
      await req.session.raw('SELECT 1/0').catch(() => {});
      res.sendStatus(400);
    });
    expect(await site.get()).toMatchObject({ status: 400 });
    await events.settled();
    expect(events.destroyed()).toEqual([]);
  });
});
