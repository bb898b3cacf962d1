import { withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const ledger = useLedger();

/** tarn counts how often it was asked. */
const askedOf = (knex: Knex): number => knex.client.pool.eventId;
const pidIn = (knex: Knex) =>
  withSession(knex, async (session) => (await session.raw('SELECT pg_backend_pid() AS pid')).rows[0].pid as number);

/** A pool with one connection that is free. */
async function warm(config: Knex.Config = {}) {
  const knex = ledger.pool({ ...config, pool: { min: 0, max: 1, ...config.pool } });
  return { knex, pid: await pidIn(knex) };
}

describe('a connection that is free', () => {
  it('is taken without a question, counted as used, and given back', async () => {
    const { knex, pid } = await warm();
    const asked = askedOf(knex);
    await withSession(knex, async (session) => {
      const { rows } = await session.raw('SELECT pg_backend_pid() AS pid');
      expect(rows).toEqual([{ pid }]);
      expect(poolUsage(knex)).toEqual({ used: 1, free: 0, pendingAcquires: 0 });
    });
    expect(poolUsage(knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 });
    expect(askedOf(knex)).toBe(asked);
  });

  it('is not taken when it is known to be dead', async () => {
    const { knex, pid } = await warm();
    await ledger.knex.raw('SELECT pg_terminate_backend(?)', [pid]);
    await eventually(() => expect(knex.client.pool.free[0].resource.__knex__disposed).toBeDefined());
    expect(await pidIn(knex)).not.toBe(pid);
    await ledger.isClean(knex);
  });

  it('is taken where `pool` is null, as a configuration in JSON may have it', async () => {
    const knex = ledger.pool({ pool: null as never });
    await knex.raw('SELECT 1');
    expect((await withSession(knex, (session) => session.raw('SELECT 1 AS one'))).rows).toEqual([{ one: 1 }]);
  });

  it('goes to those who have waited, not to who comes at that moment', async () => {
    const { knex } = await warm();
    const mayEnd = deferred();
    const holder = withSession(knex, async (session) => {
      await session('notes');
      await mayEnd.promise;
    });
    await eventually(() => expect(poolUsage(knex).used).toBe(1));
    const order: string[] = [];
    const waiter = pidIn(knex).then(() => order.push('waiter'));
    await eventually(() => expect(poolUsage(knex).pendingAcquires).toBe(1));
    mayEnd.resolve();
    const late = holder.then(() => pidIn(knex)).then(() => order.push('late'));
    await Promise.all([waiter, late]);
    expect(order).toEqual(['waiter', 'late']);
  });

  it('is still closed when nobody has wanted it for idleTimeoutMillis', async () => {
    const { knex, pid } = await warm({ pool: { idleTimeoutMillis: 20, reapIntervalMillis: 10 } });
    expect(await pidIn(knex)).toBe(pid);
    await eventually(() => expect(poolUsage(knex).free).toBe(0));
  });
});

describe('Knex is asked for a connection, as by anybody else', () => {
  it('where somebody listens to its pool', async () => {
    const { knex } = await warm();
    const heard: string[] = [];
    for (const event of ['acquireRequest', 'acquireSuccess'] as const) knex.client.pool.on(event, () => heard.push(event));
    await pidIn(knex);
    expect(heard).toEqual(['acquireRequest', 'acquireSuccess']);
  });

  it('where somebody has put a method of his own in between', async () => {
    const { knex } = await warm();
    let calls = 0;
    const { acquireConnection } = knex.client;
    knex.client.acquireConnection = () => {
      calls++;
      return acquireConnection.call(knex.client);
    };
    await pidIn(knex);
    expect(calls).toBe(1);
  });

  it('where a class of its own finds the connection', async () => {
    let calls = 0;
    const Client_PG = (await warm()).knex.client.constructor as new (config: Knex.Config) => Knex.Client;
    class Own extends Client_PG {
      override acquireConnection(): ReturnType<Knex.Client['acquireConnection']> {
        calls++;
        return super.acquireConnection();
      }
    }
    const { knex } = await warm({ client: Own as never });
    await pidIn(knex);
    expect(calls).toBe(2);
  });

  it('where its options may have more to ask of a connection', async () => {
    const { knex } = await warm({ pool: { validate: () => true } as Knex.PoolConfig });
    const asked = askedOf(knex);
    await pidIn(knex);
    expect(askedOf(knex)).toBeGreaterThan(asked);
  });
});
