import { channel, subscribe, unsubscribe } from 'node:diagnostics_channel';
import { sessionChannels, withSession } from 'express-knex-session';
import { Observation } from '../lib/events';
import { openSite } from './support/deadlines';
import { get } from './support/http';
import { flavours, type Handler, insert, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

declare const realProcess: NodeJS.Process;

failOnWarnings();
const ledger = useLedger();

const store: Handler = async (req, res) => {
  await insert(req, req.path);
  res.sendStatus(201);
};

/** Subscribes until the end of the test. */
const ends: (() => void)[] = [];
function listen(name: keyof typeof sessionChannels, listener: (message: any) => void): void {
  sessionChannels[name].subscribe(listener);
  ends.push(() => sessionChannels[name].unsubscribe(listener));
}
afterEach(() => {
  for (const end of ends.splice(0)) end();
  for (const { hasSubscribers } of Object.values(sessionChannels)) expect(hasSubscribers).toBe(false);
});

describe('the channels', () => {
  it('are those of node:diagnostics_channel, under names that are part of the API', async () => {
    const names = Object.fromEntries(Object.entries(sessionChannels).map(([key, { name }]) => [key, name]));
    expect(names).toEqual({
      acquire: 'express-knex-session.session.acquire',
      open: 'express-knex-session.session.open',
      settle: 'express-knex-session.session.settle',
      settled: 'express-knex-session.session.settled',
      late: 'express-knex-session.session.late',
      long: 'express-knex-session.session.long',
      destroyed: 'express-knex-session.connection.destroyed',
    });
    for (const [key, name] of Object.entries(names)) expect(channel(name)).toBe(sessionChannels[key as 'open']);
    const told: unknown[] = [];
    const listener = (message: unknown, name: string | symbol) => void told.push(name, message);
    subscribe('express-knex-session.session.settled', listener);
    await withSession(ledger.knex, (session) => session.raw('SELECT 1'));
    expect(told).toEqual(['express-knex-session.session.settled', expect.objectContaining({ outcome: 'committed' })]);
    expect(unsubscribe('express-knex-session.session.settled', listener)).toBe(true);
  });
});

describe('without subscribers', () => {
  it('no message is made, be the session used or not', async () => {
    const made = jest.spyOn(Observation.prototype, 'opened');
    const site = await openSite(ledger, store);
    expect(await site.get()).toMatchObject({ status: 201 });
    const untouched = await openSite(ledger, (_req, res) => res.end());
    await untouched.get();
    expect(made).not.toHaveBeenCalled();
    // It would have been seen.
    listen('settled', () => {});
    await untouched.get();
    expect(made).not.toHaveBeenCalled();
    await get(`${site.url}/other`);
    expect(made).toHaveBeenCalledTimes(1);
    made.mockRestore();
  });

  it('none is made for those of `late` and `destroyed` alone', async () => {
    listen('late', () => {});
    listen('destroyed', () => {});
    const made = jest.spyOn(Observation.prototype, 'opened');
    await (await openSite(ledger, store)).get();
    expect(made).not.toHaveBeenCalled();
    made.mockRestore();
  });

  it('warnAfter works all the same', async () => {
    const site = await openSite(ledger, async (req, res) => void (await req.session.raw('SELECT pg_sleep(0.04)').then(() => res.end())), {
      warnAfter: 20,
    });
    await site.get();
    expect(site.reported).toMatchObject([{ code: 'ERR_SESSION_OPEN_LONG' }]);
  });
});

describe('when somebody subscribes, or unsubscribes, while a transaction is open', () => {
  it.each(['open', 'settle', 'settled'] as const)('tells %s nothing of it, and of all that come after it', async (name) => {
    const isOpen = deferred();
    const mayEnd = deferred();
    const site = await openSite(ledger, async (req, res) => {
      await insert(req, req.path);
      if (req.path === '/first') {
        isOpen.resolve();
        await mayEnd.promise;
      }
      res.sendStatus(201);
    });
    const first = get(`${site.url}/first`);
    await isOpen.promise;
    const told: string[] = [];
    listen(name, ({ request }) => void told.push(request.path));
    expect(await get(`${site.url}/second`)).toMatchObject({ status: 201 });
    mayEnd.resolve();
    expect(await first).toMatchObject({ status: 201 });
    expect(told).toEqual(['/second']);
  });

  it('goes on, and tells the others', async () => {
    const told: string[] = [];
    const site = await openSite(ledger, async (req, res) => {
      await insert(req, 'a');
      for (const end of ends.splice(0)) end();
      listen('settled', ({ statements }) => void told.push(`settled with ${statements}`));
      await insert(req, 'b');
      res.sendStatus(201);
    });
    listen('acquire', () => void told.push('acquire'));
    listen('settle', () => void told.push('settle'));
    expect(await site.get()).toMatchObject({ status: 201 });
    expect(told).toEqual(['acquire', 'settled with 2']);
  });
});

describe.each(flavours)('on $version, when a listener throws', (flavour) => {
  let thrown: unknown[] = [];
  let others: NodeJS.UncaughtExceptionListener[] = [];
  const remember = (error: unknown): void => void thrown.push(error);

  beforeEach(() => {
    thrown = [];
    // Jest's own would fail the test.
    others = realProcess.listeners('uncaughtException');
    realProcess.removeAllListeners('uncaughtException');
    realProcess.on('uncaughtException', remember);
  });
  afterEach(() => {
    realProcess.off('uncaughtException', remember);
    for (const other of others) realProcess.on('uncaughtException', other);
  });

  it.each(['acquire', 'open', 'settle', 'settled'] as const)(
    '%s: the request is served, and the others are told; Node throws the error on',
    async (name) => {
      const error = new Error(`of ${name}`);
      const told: string[] = [];
      listen(name, () => {
        throw error;
      });
      listen(name, () => void told.push(name));
      const site = await openSite(ledger, store, { flavour });
      expect(await site.get()).toMatchObject({ status: 201 });
      expect(told).toEqual([name]);
      expect(thrown).toEqual([error]);
      expect(site.errors).toEqual([]);
      expect(await ledger.stored()).toEqual(['/']);
    },
  );

  it('late and destroyed: the caller hears of its own error', async () => {
    const error = new Error('of the listener');
    const fail = (): never => {
      throw error;
    };
    listen('late', fail);
    listen('destroyed', fail);
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        await ledger.killBackend();
        // Whether it has heard by now that its connection is dead, or hears it as the answer to ROLLBACK.
        await req.session.rollback().catch(() => {});
        await insert(req, 'b').catch(({ code }) => res.status(409).send(code));
      },
      { flavour },
    );
    expect(await site.get()).toMatchObject({ status: 409, body: 'ERR_SESSION_CLOSED' });
    expect(thrown).toEqual([error, error]);
  });

  it('long: the transaction goes on, and onError is told', async () => {
    const error = new Error('of the listener');
    listen('long', () => {
      throw error;
    });
    const site = await openSite(ledger, (req, res) => req.session.raw('SELECT pg_sleep(0.04)').then(() => res.end()), {
      flavour,
      warnAfter: 20,
    });
    expect(await site.get()).toMatchObject({ status: 200 });
    expect(thrown).toEqual([error]);
    expect(site.reported).toHaveLength(1);
  });
});

describe('when a listener uses the session', () => {
  it('in acquire: its statement is part of the transaction', async () => {
    listen(
      'acquire',
      ({ session, request }) =>
        void (
          request.path === '/' &&
          session('notes')
            .insert({ id: 'audit' })
            .catch(() => {})
        ),
    );
    const site = await openSite(ledger, store);
    expect(await site.get()).toMatchObject({ status: 201 });
    expect(await ledger.stored()).toEqual(['/', 'audit']);
  });

  it.each(['settle', 'settled'] as const)('in %s: it is refused', async (name) => {
    const refused: string[] = [];
    listen(
      name,
      ({ session }) =>
        void session('notes')
          .insert({ id: 'audit' })
          .catch(({ code }: any) => refused.push(code)),
    );
    const site = await openSite(ledger, store);
    expect(await site.get()).toMatchObject({ status: 201 });
    expect(refused).toEqual(['ERR_SESSION_CLOSED']);
    expect(await ledger.stored()).toEqual(['/']);
  });

  it.each(['acquire', 'open'] as const)('in %s, to roll back: the statement is refused, and it settles once', async (name) => {
    const settled: string[] = [];
    listen(name, ({ session }) => void session.rollback());
    listen('settled', ({ outcome, reason }) => void settled.push(outcome, reason));
    for (let i = 0; i < 2; i++) {
      const site = await openSite(ledger, store);
      expect(await site.get()).toMatchObject({ status: 500, body: expect.stringContaining('ERR_SESSION_CLOSED') });
      await ledger.isClean();
    }
    expect(settled.filter((_, i) => i % 2)).toEqual(['rollback', 'rollback']);
    expect(await ledger.stored()).toEqual([]);
  });
});
