import { type Session, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { cancelled, clientHasGone, ENDLESS, pidOf, useAborts } from './support/abort';
import { startCancelProxy } from './support/abort-proxy';
import { RawClient } from './support/http';
import { express5Flavour, insert } from './support/ledger';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const aborts = useAborts();

type Outer = (knex: Knex, work: (outer: Knex.Transaction) => Promise<void>) => Promise<void>;
const outers: [string, Outer][] = [
  ['a Knex.Transaction', (knex, work) => knex.transaction(work)],
  ['a session', (knex, work) => withSession(knex, work)],
  ['a savepoint of a session', (knex, work) => withSession(knex, (session) => session.transaction(work))],
];

/** What the server does for the connection of a transaction. */
async function backendOf(pid: number): Promise<object> {
  return aborts.ledger.database.admin('pg_stat_activity').where({ pid }).first('state', 'wait_event', 'query');
}

const isAsleep = (pid: number): Promise<void> =>
  eventually(async () => expect(await backendOf(pid)).toMatchObject({ wait_event: 'PgSleep', query: ENDLESS }));

const ids = (outer: Knex.Transaction): Promise<string[]> => outer('notes').orderBy('id').pluck('id');

describe.each(outers)('when %s is given as knex', (_, open) => {
  it('and a client leaves in a running statement: it is cancelled, and the outer transaction goes on without that work', async () => {
    await open(aborts.ledger.knex, async (outer) => {
      await outer('notes').insert({ id: 'outer' });
      const pid = await pidOf(outer);
      let error: unknown;
      let reason: unknown;
      const { port } = await aborts.ledger.serving(express5Flavour)(
        async (req, res) => {
          await insert(req, req.path);
          if (req.path === '/stays') return res.sendStatus(201);
          req.session.signal.addEventListener('abort', () => {
            reason = req.session.signal.reason;
          });
          error = await req.session.raw(ENDLESS).then(
            () => 'no error',
            (failure: unknown) => failure,
          );
          return undefined;
        },
        { knex: outer },
      );
      const client = (await RawClient.connect(port)).get('/leaves');
      await isAsleep(pid);
      await client.reset();
      await eventually(() => expect(error).toMatchObject(cancelled), 1_000);
      expect(error).toBe(reason);

      const next = (await RawClient.connect(port)).get('/stays');
      await next.readUntil('201 Created');
      await next.destroy();
      expect(await ids(outer)).toEqual(['/stays', 'outer']);
    });
    expect(await aborts.ledger.stored()).toEqual(['/stays', 'outer']);
  });

  it('and a client leaves while another session of it runs: gives up its turn, and the other commits', async () => {
    await open(aborts.ledger.knex, async (outer) => {
      const pid = await pidOf(outer);
      const errors: unknown[] = [];
      const { port } = await aborts.ledger.serving(express5Flavour)(
        async (req, res) => {
          await Promise.resolve(insert(req, req.path)).catch((error) => {
            errors.push(error);
            throw error;
          });
          await req.session.raw('SELECT pg_sleep(0.2)');
          res.sendStatus(201);
        },
        { knex: outer },
      );
      const staying = (await RawClient.connect(port)).get('/stays');
      await eventually(async () => expect(await backendOf(pid)).toMatchObject({ wait_event: 'PgSleep' }));
      const leaving = (await RawClient.connect(port)).get('/leaves');
      await eventually(async () => expect(await backendOf(pid)).toMatchObject({ wait_event: 'PgSleep' }));
      await leaving.reset();
      await staying.readUntil('201 Created');
      await staying.destroy();
      // Behind the savepoint of the one that left, which comes late and is given back at once.
      await outer.transaction(async () => {});
      expect(await ids(outer)).toEqual(['/stays']);
      for (const error of errors) expect(error).toMatchObject(clientHasGone);
    });
    expect(await aborts.ledger.stored()).toEqual(['/stays']);
  });

  it.each(['.timeout(ms, { cancel: true })', 'an interruption while it commits'])(
    'and %s: a late cancel does not hit what comes next in the outer transaction',
    async (way) => {
      const released = deferred();
      const proxy = await startCancelProxy(aborts.ledger.database.url);
      proxy.fate = released.promise;
      try {
        await open(aborts.ledger.pool({ connection: proxy.url, pool: { min: 0, max: 1 } }), async (outer) => {
          await outer('notes').insert({ id: 'outer' });
          // Ends by itself, and then its cancel comes.
          const work = async (session: Session): Promise<void> => {
            const slow = session.raw('SELECT pg_sleep(0.2)');
            if (way.startsWith('.timeout')) await expect(slow.timeout(50, { cancel: true })).rejects.toThrow('timeout of 50ms');
            else slow.catch(() => {});
          };
          const inner = withSession(outer, work, way.startsWith('.timeout') ? {} : { transactionTimeout: 50 });
          const later = inner.catch(() => {}).then(() => outer.raw('SELECT pg_sleep(0.1)'));
          const pid = await eventually(async () => {
            const { rows } = await aborts.ledger.database.admin.raw(
              "SELECT pid FROM pg_stat_activity WHERE query LIKE '%pg_sleep(0.2)' AND state <> 'active' AND datname = current_database()",
            );
            expect([rows.length, proxy.cancels]).toEqual([1, 1]);
            return rows[0].pid as number;
          });
          // Nothing is sent as long as a cancel may come.
          for (let i = 0; i < 5; i++)
            expect(await backendOf(pid)).toMatchObject({ state: 'idle in transaction', query: 'SELECT pg_sleep(0.2)' });
          released.resolve();
          await later;
          expect(await ids(outer)).toEqual(['outer']);
        });
      } finally {
        released.resolve();
        await proxy.close();
      }
      expect(await aborts.ledger.stored()).toEqual(['outer']);
    },
  );
});

it('when a session is interrupted whose statement waits behind one of the outer session: never lets it run', async () => {
  const began = performance.now();
  await withSession(aborts.ledger.knex, async (outer) => {
    let sibling: Promise<unknown> | undefined;
    const inner = withSession(
      outer,
      async (session) => {
        await session('notes').insert({ id: 'inner' });
        sibling = outer.raw('SELECT pg_sleep(0.2)').then(() => {});
        await session.raw(ENDLESS);
      },
      { transactionTimeout: 100 },
    );
    await expect(inner).rejects.toMatchObject({ code: 'ERR_SESSION_TIMEOUT' });
    await sibling;
    await outer('notes').insert({ id: 'outer' });
  });
  expect(performance.now() - began).toBeLessThan(10_000);
  expect(await aborts.ledger.stored()).toEqual(['outer']);
});
