import { withSession } from 'express-knex-session';
import createKnex, { type Knex } from 'knex';
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

/** A pool whose only connection is in use, by a session that ends when it is told to. */
async function full(config: Knex.Config = {}) {
  const { knex, pid } = await warm(config);
  const mayEnd = deferred();
  const holder = withSession(knex, async (session) => {
    await session.raw('SELECT 1');
    await mayEnd.promise;
  });
  await eventually(() => expect(poolUsage(knex).used).toBe(1));
  return {
    knex,
    pid,
    async end() {
      mayEnd.resolve();
      await holder;
    },
  };
}

const waiting = (knex: Knex, count: number) => eventually(() => expect(poolUsage(knex).pendingAcquires).toBe(count));

describe('a session that waits for a connection', () => {
  it('stands in the queue of the pool without a question, and is handed the connection of the one that ends', async () => {
    const { knex, pid, end } = await full();
    const asked = askedOf(knex);
    const validate = jest.spyOn(knex.client.pool, 'validate');
    const waiter = pidIn(knex);
    await waiting(knex, 1);
    await end();
    expect(await waiter).toBe(pid);
    expect(validate).not.toHaveBeenCalled();
    expect(poolUsage(knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 });
    expect(askedOf(knex)).toBe(asked);
  });

  it('has its turn among those who wait for Knex itself', async () => {
    const { knex, end } = await full();
    const order: string[] = [];
    const bySession = (name: string) => pidIn(knex).then(() => order.push(name));
    const byKnex = (name: string) => knex.raw('SELECT 1').then(() => order.push(name));
    const all: Promise<unknown>[] = [];
    for (const [i, wait] of [bySession, byKnex, bySession, bySession, byKnex, byKnex, bySession].entries()) {
      all.push(wait(String(i)));
      await waiting(knex, i + 1);
    }
    await end();
    await Promise.all(all);
    expect(order.join('')).toBe('0123456');
    expect(poolUsage(knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 });
  });

  it('leaves the queue when it gives up', async () => {
    const { knex, end } = await full();
    const call = withSession(knex, (session) => session.raw('SELECT 1'), { acquireTimeout: 60 });
    await expect(call).rejects.toMatchObject({ code: 'ERR_SESSION_UNAVAILABLE' });
    expect(poolUsage(knex)).toEqual({ used: 1, free: 0, pendingAcquires: 0 });
    await end();
    await ledger.isClean(knex);
  });

  it('gives a connection back that tarn has found for it when it has given up', async () => {
    const { knex, end } = await full();
    await end();
    const held = await knex.client.acquireConnection();
    const session = withSession(knex, (session) => session.raw('SELECT 1'), { acquireTimeout: 300 });
    const refused = expect(session).rejects.toMatchObject({ code: 'ERR_SESSION_UNAVAILABLE' });
    await waiting(knex, 1);
    // tarn looks at a connection before it hands it out: in that time the limit passes.
    const { validate } = knex.client.pool;
    const mayBeFound = deferred();
    knex.client.pool.validate = async () => {
      await mayBeFound.promise;
      return true;
    };
    knex.client.releaseConnection(held);
    expect(poolUsage(knex).pendingAcquires).toBe(0);
    const next = knex.raw('SELECT 1');
    await refused;
    knex.client.pool.validate = validate;
    mayBeFound.resolve();
    await next;
    await eventually(() => expect(poolUsage(knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 }));
  });

  it('is not handed a connection that is dead, and keeps its place until there is a new one', async () => {
    const { knex, pid, end } = await full();
    const order: string[] = [];
    const waiters = ['first', 'second'].map((name) =>
      pidIn(knex).then((found) => {
        order.push(name);
        return found;
      }),
    );
    await waiting(knex, 2);
    await ledger.knex.raw('SELECT pg_terminate_backend(?)', [pid]);
    await end().catch(() => {});
    for (const found of await Promise.all(waiters)) expect(found).not.toBe(pid);
    expect(order).toEqual(['first', 'second']);
    await ledger.isClean(knex);
  });

  it('gets its connection through the pool where somebody has begun to listen to that', async () => {
    const { knex, pid, end } = await full();
    const waiter = pidIn(knex);
    await waiting(knex, 1);
    const released: unknown[] = [];
    knex.client.pool.on('release', (connection: unknown) => released.push(connection));
    await end();
    expect(await waiter).toBe(pid);
    expect(released).toHaveLength(2);
  });

  it('hears of it when no connection can be made', async () => {
    const { knex, end } = await full({ pool: { max: 2 } });
    const refused = new Error('no more of them');
    let refuse: ((error: Error) => void) | undefined;
    knex.client.acquireRawConnection = () =>
      new Promise((_, reject) => {
        refuse = reject;
      });
    // The second connection is being made for this one, and the pool is full as long as that takes.
    const byKnex = Promise.resolve(knex.raw('SELECT 1'));
    byKnex.catch(() => {});
    await waiting(knex, 1);
    const waiter = pidIn(knex);
    await waiting(knex, 2);
    const made = refuse;
    made?.(refused);
    await expect(byKnex).rejects.toBe(refused);
    await eventually(() => expect(refuse).not.toBe(made));
    refuse?.(refused);
    await expect(waiter).rejects.toMatchObject({ code: 'ERR_SESSION_UNAVAILABLE', cause: refused });
    await end();
    expect(poolUsage(knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 });
  });

  it('hears of it when its pool is destroyed, and so do those behind it', async () => {
    const { knex, end } = await full();
    const told: string[] = [];
    for (const [i, wait] of [() => pidIn(knex), () => knex.raw('SELECT 1'), () => pidIn(knex), () => pidIn(knex)].entries()) {
      Promise.resolve(wait()).catch((error) => told.push(`${i} ${error.cause?.message ?? error.message}`));
      await waiting(knex, i + 1);
    }
    const destroyed = knex.destroy();
    await end();
    await destroyed;
    await eventually(() => expect(told.sort()).toEqual(['0 aborted', '1 aborted', '2 aborted', '3 aborted']));
    knex.initialize();
  });

  it.each([
    ['somebody listens to the pool', { listens: true }],
    ['it may wait for longer than Knex itself', { acquireTimeout: 61_000 }],
  ])('asks Knex where %s', async (_why, { listens = false, acquireTimeout = 5_000 }: { listens?: boolean; acquireTimeout?: number }) => {
    const { knex, pid, end } = await full();
    const heard: string[] = [];
    if (listens) for (const event of ['acquireSuccess', 'release'] as const) knex.client.pool.on(event, () => heard.push(event));
    const asked = askedOf(knex);
    const waiter = withSession(knex, (session) => session.raw('SELECT pg_backend_pid() AS pid'), { acquireTimeout });
    await waiting(knex, 1);
    expect(askedOf(knex)).toBe(asked + 1);
    await end();
    expect((await waiter).rows).toEqual([{ pid }]);
    if (listens) expect(heard).toEqual(['release', 'acquireSuccess', 'release']);
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

  it('where that class shares the pool of a plain Knex', async () => {
    const { knex } = await warm();
    let calls = 0;
    const Client_PG = knex.client.constructor as new (config: Knex.Config) => Knex.Client;
    class Own extends Client_PG {
      override acquireConnection(): ReturnType<Knex.Client['acquireConnection']> {
        calls++;
        return super.acquireConnection();
      }
    }
    const sharing = createKnex({ client: Own as never });
    sharing.client.pool = knex.client.pool;
    await pidIn(sharing);
    expect(calls).toBe(1);
  });

  it('where its options may have more to ask of a connection', async () => {
    const pool = { min: 0, max: 1, validate: () => true } as Knex.PoolConfig;
    const { knex } = await warm({ pool });
    const { knex: initialized } = await warm();
    await initialized.destroy();
    initialized.initialize({ ...knex.client.config, pool });
    for (const asking of [knex, initialized]) {
      await pidIn(asking);
      const asked = askedOf(asking);
      await pidIn(asking);
      expect(askedOf(asking)).toBeGreaterThan(asked);
    }
  });
});
