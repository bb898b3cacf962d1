import { clientHasGone, ENDLESS, pidOf, useAborts, used, type Victim, type VictimOptions } from './support/abort';
import { type CancelFate, type CancelProxy, startCancelProxy } from './support/abort-proxy';
import { get } from './support/http';
import { express5Flavour, type Handler, insert } from './support/ledger';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred, isSql } from './support/wire';

failOnWarnings();
const proxies: CancelProxy[] = [];
// Before the ledger's own: a test that fails may leave a cancel that hangs, and a backend that sleeps.
afterEach(async () => {
  await Promise.all(proxies.splice(0).map((proxy) => proxy.close()));
  await aborts.ledger.database.admin.raw(
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%pg_sleep(30)%' AND pid <> pg_backend_pid()",
  );
});
const aborts = useAborts();

/** A victim whose cancels go through a proxy. */
async function behindProxy(fate: CancelProxy['fate'], handler: Handler, options: VictimOptions = {}) {
  const proxy = await startCancelProxy(aborts.ledger.database.url);
  proxies.push(proxy);
  proxy.fate = fate;
  const knex = aborts.ledger.pool({ connection: proxy.url, pool: { min: 0, max: 1 } });
  const reported: unknown[] = [];
  const victim = await aborts.open(handler, { knex, onError: (error) => reported.push(error), ...options });
  return { proxy, victim, knex, reported };
}

const insertAndRun =
  (sql: string): Handler =>
  async (req) => {
    await insert(req, 'a');
    await req.session.raw(sql);
  };

/** What must be true when the connection was given up. */
async function wasDestroyed(victim: Victim, reported: unknown[]): Promise<void> {
  await eventually(() => expect([victim.hasEnded, used(victim.knex)]).toEqual([true, 0]));
  expect(victim.reasons).toHaveLength(1);
  expect(victim.error).toMatchObject(clientHasGone);
  expect(reported).toMatchObject([{ message: expect.stringContaining('settleTimeout') }]);
  expect(await pidOf(victim.knex)).not.toBe(victim.pid);
}

describe("when the cancel's connection is", () => {
  const always: [string, CancelFate, string][] = [
    ['never closed by the server, which has cancelled the statement', 'keep open', 'aborted'],
    ['never answered', 'swallow', 'asleep'],
    ['refused', 'refuse', 'asleep'],
  ];
  it.each(always)('%s: destroys the connection after settleTimeout, and frees its slot', async (_, fate, expected) => {
    const { victim, proxy, reported } = await behindProxy(fate, insertAndRun(ENDLESS), { settleTimeout: 200 });
    await victim.isSleeping();
    await victim.client.reset();
    await eventually(() => expect(proxy.cancels).toBeGreaterThan(0));
    const state = expected === 'aborted' ? 'idle in transaction (aborted)' : 'active';
    await eventually(async () => expect(await victim.backend()).toMatchObject({ state }));
    expect(used(victim.knex)).toBe(1);
    await wasDestroyed(victim, reported);
    expect(await aborts.ledger.stored()).toEqual([]);
  });

  it('refused at first: asks again, and gets through', async () => {
    let refusals = 2;
    const { victim, proxy } = await behindProxy(() => (refusals-- > 0 ? 'refuse' : 'pass'), insertAndRun(ENDLESS));
    await victim.isSleeping();
    await victim.client.reset();
    await victim.wasAborted();
    expect(proxy.cancels).toBeGreaterThanOrEqual(3);
  });
});

describe('when the cancel comes before the server has begun the statement', () => {
  it.each(['as the first statement', 'as a later one'])('%s: asks again', async (place) => {
    const { knex, proxy } = await aborts.ledger.throughProxy({ pool: { min: 0, max: 1 } });
    const victim = await aborts.open(
      async (req) => {
        if (place === 'as a later one') await insert(req, 'a');
        await req.session.raw(ENDLESS);
      },
      { knex },
    );
    const begin = deferred();
    const cancels = () => proxy.frontend.filter(({ type }) => type === 'CancelRequest').length;
    proxy.onFrontend((message) => (isSql(message, ENDLESS) ? begin.promise : undefined));
    await eventually(() => expect(proxy.sql()).toContain(ENDLESS));
    await victim.client.reset();
    await eventually(() => expect(cancels()).toBe(1));
    proxy.onFrontend((message) => {
      if (message.type === 'CancelRequest' && cancels() > 2) begin.resolve();
    });
    await victim.wasAborted();
  });

  // BEGIN is sent alone before these, and its answer ends a cancel.
  const alone: [string, Handler][] = [
    ['several statements in one string', (req) => req.session.raw(`SELECT 1; ${ENDLESS}`)],
    [
      'a stream of rows',
      async (req) => {
        for await (const _ of req.session.raw(ENDLESS).stream());
      },
    ],
  ];
  it.each(alone)('and BEGIN, sent alone before %s, has not been answered: asks again', async (_, handler) => {
    const { knex, proxy } = await aborts.ledger.throughProxy({ pool: { min: 0, max: 1 } });
    const held = deferred();
    const victim = await aborts.open(handler, { knex });
    proxy.onBackend(({ type, text }) => (type === 'C' && text === 'BEGIN' ? held.promise : undefined));
    await eventually(async () => expect(await victim.backend()).toMatchObject({ state: 'idle in transaction' }));
    await victim.client.reset();
    await eventually(() => expect(proxy.frontend.map(({ type }) => type)).toContain('CancelRequest'));
    held.resolve();
    await victim.wasAborted(clientHasGone);
  });
});

describe('when the cancel comes late, after the statement has ended by itself', () => {
  it('keeps the connection until it has come: the next borrower is not hit (hazard 13)', async () => {
    const released = deferred();
    const { victim, knex, proxy } = await behindProxy(released.promise, insertAndRun('SELECT pg_sleep(0.1)'));
    await victim.isSleeping();
    await victim.client.reset();
    await eventually(() => expect(proxy.cancels).toBe(1));
    await eventually(async () => expect(await victim.backend()).toMatchObject({ state: 'idle in transaction' }));

    const { url } = await aborts.ledger.serving(express5Flavour)(
      async (req, res) => {
        await req.session.raw('SELECT pg_sleep(0.1)');
        res.sendStatus(201);
      },
      { knex },
    );
    const innocent = get(url);
    // Not rolled back either: ROLLBACK could be hit.
    expect(await victim.backend()).toMatchObject({ state: 'idle in transaction' });
    released.resolve();
    expect(await innocent).toMatchObject({ status: 201 });
    await victim.isOver();
    expect(victim.reasons).toHaveLength(1);
    await victim.leftNothing();
  });

  it('of .timeout(ms, { cancel: true }): its error comes at once, and the next statement waits and is not hit', async () => {
    const released = deferred();
    let next: Promise<unknown> | undefined;
    const { victim, proxy } = await behindProxy(released.promise, async (req, res) => {
      await insert(req, 'a');
      await expect(req.session.raw('SELECT pg_sleep(0.3)').timeout(50, { cancel: true })).rejects.toThrow('timeout of 50ms');
      // The statement still runs, and so does its cancel.
      expect(await victim.backend()).toMatchObject({ state: 'active' });
      next = insert(req, 'b').then(() => req.session.raw('SELECT pg_sleep(0.1)'));
      await next;
      res.sendStatus(201);
    });
    await eventually(() => expect([next !== undefined, proxy.cancels]).toEqual([true, 1]));
    const hasEnded = { state: 'idle in transaction', query: 'SELECT pg_sleep(0.3)' };
    await eventually(async () => expect(await victim.backend()).toMatchObject(hasEnded));
    // Time enough for the next to come.
    for (let i = 0; i < 5; i++) expect(await victim.backend()).toMatchObject(hasEnded);
    released.resolve();
    await victim.client.readUntil('201 Created');
    expect(victim.error).toBeUndefined();
    expect(await aborts.ledger.stored()).toEqual(['a', 'b']);
    expect(await pidOf(victim.knex)).toBe(victim.pid);
  });
});

describe('when .timeout(ms, { cancel: true }) passes', () => {
  it('cancels the statement, and a savepoint goes on from there', async () => {
    const victim = await aborts.open(async (req, res) => {
      for (const id of ['a', 'b', 'c', 'd', 'e']) {
        const slow = req.session.transaction((savepoint) => savepoint.raw(ENDLESS).timeout(10, { cancel: true }));
        await expect(slow).rejects.toThrow('timeout of 10ms');
        await insert(req, id);
      }
      res.sendStatus(201);
    });
    await victim.client.readUntil('HTTP/1.1 201');
    expect(victim.reasons).toEqual([]);
    expect(await aborts.ledger.stored()).toEqual(['a', 'b', 'c', 'd', 'e']);
    expect(await pidOf(victim.knex)).toBe(victim.pid);
  });

  it.each(['the first statement', 'a later one'])(
    'in %s, and its error is swallowed: the next is told why, and nothing is committed',
    async (place) => {
      const next: unknown[] = [];
      const victim = await aborts.open(async (req, res) => {
        if (place === 'a later one') await insert(req, 'a');
        await expect(req.session.raw(ENDLESS).timeout(20, { cancel: true })).rejects.toThrow('timeout of 20ms');
        await insert(req, 'b').catch((error: unknown) => next.push(error));
        res.sendStatus(201);
      });
      await victim.client.readUntil('ERR_TRANSACTION_ABORTED');
      expect(victim.client.received).toContain('HTTP/1.1 500');
      expect(next).toMatchObject([{ code: '25P02', cause: { code: '57014' } }]);
      await victim.leftNothing();
    },
  );

  it('and its cancel hangs, in a session that is then left: destroys the connection after settleTimeout', async () => {
    const { victim, reported } = await behindProxy(
      'swallow',
      async (req) => {
        await insert(req, 'a');
        await req.session
          .raw(ENDLESS)
          .timeout(10, { cancel: true })
          .catch(() => {});
        await req.session.raw('SELECT 1');
      },
      { settleTimeout: 200 },
    );
    await victim.isSleeping();
    await victim.client.reset();
    await wasDestroyed(victim, reported);
    expect(await aborts.ledger.stored()).toEqual([]);
  });

  it('and its cancel hangs, in a session that then says 201: ends at transactionTimeout and settleTimeout', async () => {
    const { victim } = await behindProxy(
      'swallow',
      async (req, res) => {
        await insert(req, 'a');
        await req.session
          .raw(ENDLESS)
          .timeout(10, { cancel: true })
          .catch(() => {});
        res.sendStatus(201);
      },
      { transactionTimeout: 100, settleTimeout: 100 },
    );
    await victim.client.readUntil('503 Service Unavailable');
    await eventually(() => expect(used(victim.knex)).toBe(0));
    expect(await aborts.ledger.stored()).toEqual([]);
  });
});
