import { SessionUnavailableError } from 'express-knex-session';
import { never, openSite, rejection, type Site, type SiteOptions } from './support/deadlines';
import { get, RawClient } from './support/http';
import { type Handler, insert, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred, isSql } from './support/wire';

failOnWarnings();
const ledger = useLedger();
const drained = { status: 503, body: expect.stringContaining('"ERR_SESSION_UNAVAILABLE"') };

/** An app whose handler waits between its statements until the test says so. */
async function waitingSite(options: SiteOptions = {}): Promise<Site & { goOn(): void; isOpen(count?: number): Promise<void> }> {
  const { promise, resolve } = deferred();
  const site = await openSite(
    ledger,
    async (req, res) => {
      await insert(req, req.path);
      await promise;
      await insert(req, `${req.path}, again`);
      res.status(201).end();
    },
    options,
  );
  return Object.assign(site, {
    goOn: () => resolve(),
    isOpen: (count = 1) => eventually(() => expect(site.sessions.stats().open).toBe(count)),
  });
}

describe('drain()', () => {
  it('resolves at once if nothing is open, and refuses every session from then on', async () => {
    const site = await openSite(ledger, async (req, res) => {
      if (req.path !== '/static') await insert(req, 'a');
      res.send('served');
    });
    await site.sessions.drain(10_000);
    expect(await site.get()).toMatchObject(drained);
    expect(site.errors).toEqual([expect.any(SessionUnavailableError)]);
    expect(site.errors[0].message).toContain('drain');
    // What needs no database is still served.
    expect((await get(`${site.url}/static`)).body).toBe('served');
    expect(poolUsage(ledger.knex).used).toBe(0);
  });

  it.each([true, false])('does not wait for a hook that has ended (transaction: %s)', async (transaction) => {
    const work: Handler = async (req, res) => {
      await insert(req, 'a');
      req.session.afterCommit(async (session) => void (await session('notes').insert({ id: 'of the hook' })));
      res.status(201).end();
    };
    const site = await openSite(ledger, work, { transaction });
    expect((await site.get()).status).toBe(201);
    await eventually(async () => expect(await ledger.stored()).toEqual(['a', 'of the hook']));
    await site.sessions.drain(10_000);
    expect(site.sessions.stats()).toMatchObject({ open: 0, waiting: 0 });
  });

  it('waits for those that are open, which may go on, and refuses new ones meanwhile', async () => {
    const site = await waitingSite();
    const answer = site.get();
    await site.isOpen();
    let isDone = false;
    const done = site.sessions.drain(10_000).then(() => {
      isDone = true;
    });
    expect(await get(`${site.url}/new`)).toMatchObject(drained);
    expect(isDone).toBe(false);
    site.goOn();
    await done;
    expect((await answer).status).toBe(201);
    expect(await ledger.stored()).toEqual(['/', '/, again']);
    expect(site.sessions.stats()).toEqual({ open: 0, waiting: 0, committed: 1, rolledBack: 0, unknown: 0 });
  });

  it('interrupts those that are left after its time, and destroys their connections', async () => {
    const site = await waitingSite();
    const answers = ['/a', '/b', '/c'].map((path) => get(site.url + path));
    await site.isOpen(3);
    const resources = ledger.knex.client.pool.used.map(({ resource }: { resource: unknown }) => resource);
    await site.sessions.drain(60);
    expect(site.sessions.stats()).toEqual({ open: 0, waiting: 0, committed: 0, rolledBack: 3, unknown: 0 });
    for (const answer of await Promise.all(answers)) {
      expect(answer).toMatchObject({ ...drained, headers: { connection: 'close' } });
    }
    expect(site.errors).toHaveLength(3);
    expect(await ledger.stored()).toEqual([]);
    await ledger.knex.raw('SELECT 1');
    for (const resource of resources) expect(resource).toMatchObject({ _ending: true });
    site.goOn();
  });

  it('interrupts at once with 0: the statement that runs, and the session that waits for the pool', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 } });
    const told: any[] = [];
    const site = await openSite(
      ledger,
      async (req) => {
        const error = await rejection(req.session.raw('SELECT pg_sleep(10)'));
        told.push(error);
        throw error;
      },
      { knex },
    );
    const answers = [site.get(), site.get()];
    await eventually(() => expect(site.sessions.stats()).toMatchObject({ open: 1, waiting: 1 }));
    await site.sessions.drain(0);
    for (const answer of await Promise.all(answers)) expect(answer).toMatchObject(drained);
    await eventually(() => expect(told).toHaveLength(2));
    for (const error of told) expect([error.code, error.cause?.code]).toContain('ERR_SESSION_UNAVAILABLE');
    expect(site.errors.map(({ code }) => code)).toEqual(['ERR_SESSION_UNAVAILABLE', 'ERR_SESSION_UNAVAILABLE']);
    await eventually(() => expect(poolUsage(knex)).toMatchObject({ used: 0, pendingAcquires: 0 }));
    // Neither knows of SQL, and the one that waited has never had a connection.
    expect(site.sessions.stats()).toEqual({ open: 0, waiting: 0, committed: 0, rolledBack: 1, unknown: 0 });
  });

  it('may be called again, with less patience; both calls resolve', async () => {
    const site = await waitingSite();
    const answer = site.get();
    await site.isOpen();
    const [patient, again] = [site.sessions.drain(60_000), site.sessions.drain(60_000)];
    await site.sessions.drain(0);
    await Promise.all([patient, again]);
    expect(await answer).toMatchObject(drained);
    site.goOn();
  });

  it.each([
    ['negative', -1],
    ['NaN', Number.NaN],
    ['Infinity', Number.POSITIVE_INFINITY],
    ['too much for a timer', 2 ** 31],
    ['a string', '100'],
    ['nothing', undefined],
    ['null', null],
  ])('refuses a time that is none, and goes on serving: %s', async (_what, ms) => {
    const site = await openSite(ledger, async (req, res) => {
      await insert(req, 'a');
      res.status(201).end();
    });
    const error = await rejection(site.sessions.drain(ms as number));
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toMatch(/^Expected `ms` to be a number of milliseconds from 0 to 2147483647, got /);
    expect((await site.get()).status).toBe(201);
  });

  it('leaves a COMMIT to finish that is under way, and resolves after it', async () => {
    const held = await ledger.holdCommits();
    let signal: AbortSignal | undefined;
    const site = await openSite(ledger, async (req, res) => {
      signal = req.session.signal;
      await insert(req, 'a', 'wait');
      res.status(201).end();
    });
    const answer = site.get();
    await held.waiting();
    let isDone = false;
    const done = site.sessions.drain(0).then(() => {
      isDone = true;
    });
    for (let turn = 0; turn < 5; turn++) await new Promise(setImmediate);
    expect(isDone).toBe(false);
    await held.release();
    await done;
    expect((await answer).status).toBe(201);
    expect(site.sessions.stats()).toMatchObject({ committed: 1, rolledBack: 0 });
    expect(signal?.aborted).toBe(false);
  });

  it('leaves a ROLLBACK to finish that is under way, and its response as it is', async () => {
    const { knex, proxy } = await ledger.throughProxy();
    const [reached, released] = [deferred(), deferred()];
    proxy.onFrontend((message) => {
      if (!isSql(message, 'ROLLBACK')) return undefined;
      reached.resolve();
      return released.promise;
    });
    let signal: AbortSignal | undefined;
    const throwing: Handler = async (req) => {
      signal = req.session.signal;
      await insert(req, 'a');
      throw Object.assign(new Error('mine'), { status: 418, code: 'MINE' });
    };
    const site = await openSite(ledger, throwing, { knex });
    const answer = site.get();
    await reached.promise;
    const done = site.sessions.drain(0);
    released.resolve();
    await done;
    expect(await answer).toMatchObject({ status: 418, body: expect.stringContaining('MINE') });
    expect(site.errors).toMatchObject([{ code: 'MINE' }]);
    expect(signal?.aborted).toBe(false);
    // It went back to the pool as it is: its end was an orderly one.
    expect(poolUsage(knex).free).toBe(1);
    await knex.raw('SELECT 1');
    expect(new Set(proxy.frontend.map(({ connection }) => connection)).size).toBe(1);
  });

  it('is not held up by a client that has vanished, nor by a dead network: settleTimeout bounds it', async () => {
    const { knex, proxy } = await ledger.throughProxy();
    const site = await openSite(ledger, (req) => insert(req, 'a').then(never), { knex, settleTimeout: 100 });
    const client = (await RawClient.connect(site.port)).get('/');
    await eventually(() => expect(site.sessions.stats().open).toBe(1));
    proxy.pause();
    await site.sessions.drain(0);
    expect(poolUsage(knex).used).toBe(0);
    await client.readUntil('ERR_SESSION_UNAVAILABLE');
    proxy.cut();
    proxy.resume();
  });

  it('cuts off a response that is under way, and reports it', async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        res.write('half of it');
        await never();
      },
      { commitAt: 'end' },
    );
    const client = (await RawClient.connect(site.port)).get('/');
    await client.readUntil('half of it');
    await site.sessions.drain(0);
    expect(await client.closed).toMatchObject({ code: 'ECONNRESET' });
    expect(site.reported).toMatchObject([{ code: 'ERR_SESSION_UNAVAILABLE' }]);
    expect(await ledger.stored()).toEqual([]);
  });
});

describe('stats()', () => {
  it('counts what was committed, rolled back, and what nobody knows; not what was never begun', async () => {
    const site = await openSite(ledger, async (req, res) => {
      if (req.path === '/unused') return res.end();
      await insert(req, 'a', req.path === '/fails' ? 'fail' : req.path === '/dies' ? 'die' : undefined);
      return res.sendStatus(req.path === '/refused' ? 409 : 200);
    });
    const idle = { open: 0, waiting: 0 };
    for (const [path, ended] of [
      ['/unused', { committed: 0, rolledBack: 0, unknown: 0 }],
      ['/refused', { committed: 0, rolledBack: 1, unknown: 0 }],
      ['/fails', { committed: 0, rolledBack: 2, unknown: 0 }],
      ['/dies', { committed: 0, rolledBack: 2, unknown: 1 }],
      ['/good', { committed: 1, rolledBack: 2, unknown: 1 }],
    ] as const) {
      await get(site.url + path);
      expect(site.sessions.stats()).toEqual({ ...idle, ...ended });
    }
  });

  it('belongs to one middleware, and does not change in the hands of who has asked', async () => {
    const [one, two] = [await waitingSite(), await waitingSite()];
    const answer = one.get();
    await one.isOpen();
    const before = one.sessions.stats();
    expect(two.sessions.stats().open).toBe(0);
    one.goOn();
    await answer;
    expect(before).toEqual({ open: 1, waiting: 0, committed: 0, rolledBack: 0, unknown: 0 });
    expect(one.sessions.stats()).toMatchObject({ open: 0, committed: 1 });
  });
});
