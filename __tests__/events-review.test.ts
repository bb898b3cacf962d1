import { setTimeout as delay } from 'node:timers/promises';
import express from 'express';
import { currentSession, sessionChannels, sessionMiddleware, type TransactionMessage } from 'express-knex-session';
import type { Client } from 'pg';
import { get } from './support/http';
import { insert, useLedger } from './support/ledger';
import { eventually } from './support/pool';

const ledger = useLedger();

async function told(work: () => Promise<unknown>, look: (m: TransactionMessage) => void): Promise<void> {
  sessionChannels.settled.subscribe(look);
  try {
    await work();
  } finally {
    sessionChannels.settled.unsubscribe(look);
  }
}

describe('when a subscriber of `settled` asks for stats()', () => {
  it.each([
    ['a write', {}],
    ['a read', { readOnly: true }],
  ])('finds %s ended, as the message says', async (_name, options) => {
    const sessions = sessionMiddleware(ledger.knex, options);
    const app = express().use(sessions, async (req, res) => void res.json(await req.session('notes')));
    const { url } = await ledger.listen(app);
    const seen: unknown[] = [];
    await told(
      async () => {
        await get(url);
        await eventually(() => expect(seen).toHaveLength(1));
      },
      () => seen.push(sessions.stats()),
    );
    expect(seen).toEqual([{ open: 0, waiting: 0, committed: 1, rolledBack: 0, unknown: 0 }]);
  });
});

describe('when the first statement was sent without BEGIN', () => {
  it('has an outcome that is unknown', async () => {
    const afterCreate = (connection: Client, done: (error?: Error) => void): void => {
      const query = connection.query as (...args: unknown[]) => unknown;
      connection.query = ((given: { text?: string; name?: unknown }, ...others: unknown[]) =>
        query.call(
          connection,
          given.text && given.name === '' ? { ...given, text: `${given.text} /* traced */` } : given,
          ...others,
        )) as never;
      done();
    };
    const knex = ledger.pool({ pool: { min: 0, max: 1, afterCreate } });
    const outcomes: unknown[] = [];
    let rolledBackHook = false;
    const sessions = sessionMiddleware(knex, { onError() {} });
    const app = express().use(sessions, async (req, res) => {
      req.session.afterRollback(() => {
        rolledBackHook = true;
      });
      await insert(req, 'a');
      res.end();
    });
    app.use((_e: any, _q: any, res: any, _n: any) => res.status(500).send('e'));
    const { url } = await ledger.listen(app);
    let status = 0;
    await told(
      async () => {
        status = (await get(url)).status;
      },
      ({ outcome }) => outcomes.push(outcome),
    );
    expect([status, await ledger.stored()]).toEqual([500, ['a']]);
    expect(outcomes).toEqual(['unknown']);
    expect(sessions.stats()).toMatchObject({ unknown: 1 });
    expect(rolledBackHook).toBe(false);
  });
});

describe('when the pool begins to look for idle connections because a session took one', () => {
  it('does so outside of the request', async () => {
    // A connection that comes when nobody waits for it any more: free, and nothing watches it yet.
    const afterCreate = (_connection: Client, done: () => void): void => void delay(100).then(done);
    const knex = ledger.pool({ pool: { min: 0, max: 1, reapIntervalMillis: 20, afterCreate }, acquireConnectionTimeout: 50 });
    await expect(knex.raw('SELECT 1')).rejects.toThrow('Timeout');
    const { pool } = knex.client;
    await eventually(() => expect([pool.numFree(), pool.interval]).toEqual([1, null]));
    const looked = new Promise<unknown>((resolve) => {
      pool.check = () => {
        try {
          resolve(currentSession());
        } catch (error: any) {
          resolve(error.code);
        }
      };
    });
    const app = express().use(sessionMiddleware(knex, { context: true }), async (req, res) => void res.json(await req.session('notes')));
    await get((await ledger.listen(app)).url);
    expect(await looked).toBe('ERR_SESSION_MISSING');
  });
});
