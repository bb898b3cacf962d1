import { type Session, withSession } from 'express-knex-session';
import type { Client } from 'pg';
import { type Answer, get, RawClient } from './support/http';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { type Bench, deferred, type Handler, useBench } from './support/wire';

failOnWarnings();

const insert = (session: Session, name: string) => session('items').insert({ name });

/** A request that holds a connection until it is told to end. */
async function hold(bench: Bench): Promise<{ end(): Promise<Answer> }> {
  const holds = deferred();
  const mayEnd = deferred();
  const answer = bench.answer(async (req, res) => {
    await insert(req.session, 'holder');
    holds.resolve();
    await mayEnd.promise;
    res.status(201).end();
  });
  await holds.promise;
  return {
    end() {
      mayEnd.resolve();
      return answer;
    },
  };
}

const waiting = (bench: Bench, count: number) =>
  eventually(() => expect(poolUsage(bench.knex)).toMatchObject({ used: 1, pendingAcquires: count }));

describe('when the pool is exhausted', () => {
  const bench = useBench({ pool: { min: 0, max: 1 } });

  it('still serves what needs no database (3)', async () => {
    const holder = await hold(bench);
    const waiter = bench.answer(async (req, res) => res.json(await req.session('items').count()));
    await waiting(bench, 1);

    const unused = await bench.answer((_req, res) => res.json('no database'));
    expect(unused).toMatchObject({ status: 200, body: '"no database"' });
    const url = bench.route((_req, res) => res.end());
    expect((await get(`${url}/nowhere`)).status).toBe(404);
    expect((await fetch(url, { method: 'OPTIONS' })).status).toBe(200);
    expect(
      await bench.answer(() => {
        throw Object.assign(new Error('of the app'), { status: 418 });
      }),
    ).toMatchObject({ status: 418 });

    await holder.end();
    expect(await waiter).toMatchObject({ status: 200, body: '[{"count":"1"}]' });
  });

  it('serves those who wait in their order, each with the same connection', async () => {
    const holder = await hold(bench);
    const waiters: Promise<Answer>[] = [];
    for (let i = 0; i < 5; i++) {
      waiters.push(
        bench.answer(async (req, res) => {
          await insert(req.session, `${i}`);
          res.end();
        }),
      );
      await waiting(bench, i + 1);
    }
    await holder.end();
    await Promise.all(waiters);
    expect(await bench.stored()).toEqual(['holder', '0', '1', '2', '3', '4']);
    expect(bench.proxy.connections()).toBe(1);
  });

  it.each(['with FIN', 'with RST'])('gives the late connection back if the client has left meanwhile, %s (31)', async (how) => {
    const holder = await hold(bench);
    const fate = deferred<any>();
    const url = new URL(
      bench.route(async (req, res) => {
        await insert(req.session, 'waiter').catch(fate.resolve);
        res.end();
      }),
    );
    const client = (await RawClient.connect(Number(url.port))).get(url.pathname);
    await waiting(bench, 1);
    await (how === 'with FIN' ? client.destroy() : client.reset());

    // It is told at once: it need not wait for a connection that it cannot use.
    expect(await fate.promise).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('disconnected') });
    await holder.end();
    await eventually(() => expect(poolUsage(bench.knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 }));
    expect(await bench.stored()).toEqual(['holder']);
    expect(bench.proxy.sql().filter((sql) => sql === 'BEGIN;')).toHaveLength(1);
  });

  it('gives a connection back that was still being opened when the client left', async () => {
    await bench.knex.destroy();
    bench.knex.initialize();
    bench.proxy.pause();
    const fate = deferred<any>();
    const url = new URL(
      bench.route((req, res) =>
        insert(req.session, 'waiter').then(
          () => res.end(),
          (error) => fate.resolve(error),
        ),
      ),
    );
    const client = (await RawClient.connect(Number(url.port))).get(url.pathname);
    await eventually(() => expect(bench.knex.client.pool.numPendingCreates()).toBe(1));
    await client.destroy();
    expect(await fate.promise).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    bench.proxy.resume();
    await eventually(() => expect(poolUsage(bench.knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 }));
    expect(bench.proxy.sql()).not.toContain('BEGIN;');
  });

  it('is not emptied for good by a burst of requests whose clients leave (hazard 15)', async () => {
    const holder = await hold(bench);
    const url = new URL(
      bench.route(async (req, res) => {
        await insert(req.session, 'burst');
        res.end();
      }),
    );
    const clients = await Promise.all(Array.from({ length: 30 }, () => RawClient.connect(Number(url.port))));
    for (const client of clients) client.get(url.pathname);
    await waiting(bench, 30);
    await Promise.all(clients.map((client) => client.reset()));
    await holder.end();
    await eventually(() => expect(poolUsage(bench.knex)).toMatchObject({ used: 0, pendingAcquires: 0 }));
    expect(await bench.stored()).toEqual(['holder']);
    expect((await bench.answer(async (req, res) => res.json(await req.session('items').count()))).status).toBe(200);
  });
});

describe('when no connection comes in time', () => {
  const bench = useBench({ pool: { min: 0, max: 1, acquireTimeoutMillis: 150 } });

  it('answers 503, and has run nothing (7)', async () => {
    const holder = await hold(bench);
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'waiter');
      res.end();
    });
    expect(answer.status).toBe(503);
    expect(bench.errors).toMatchObject([{ code: 'ERR_SESSION_UNAVAILABLE', cause: { name: 'KnexTimeoutError' } }]);
    await holder.end();
    expect(await bench.stored()).toEqual(['holder']);
  });

  it('tells all statements of the request, and goes on telling', async () => {
    const holder = await hold(bench);
    const codes: string[] = [];
    await bench.answer(async (req, res) => {
      const work = () => insert(req.session, 'waiter').catch((error) => codes.push(error.code));
      await Promise.all([work(), work()]);
      await work();
      res.status(503).end();
    });
    expect(codes).toEqual(Array(3).fill('ERR_SESSION_UNAVAILABLE'));
    await holder.end();
  });

  it('fails the request that uses the root knex next to its session, instead of hanging for ever (hazard 16)', async () => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      await bench.knex('items').insert({ name: 'root' });
      res.end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ name: 'KnexTimeoutError' }]);
    expect(await bench.stored()).toEqual([]);
  });
});

describe('when knex is destroyed while a session is open (hazard 17)', () => {
  const bench = useBench();

  it('lets the session finish first', async () => {
    const holder = await hold(bench);
    const destroyed = bench.knex.destroy();
    const { status } = await holder.end();
    await destroyed;
    expect(status).toBe(201);
    expect(await bench.stored()).toEqual(['holder']);
    await expect(withSession(bench.knex, (session) => session.select(1).then(() => {}))).rejects.toMatchObject({
      code: 'ERR_SESSION_UNAVAILABLE',
    });
    bench.knex.initialize();
  });
});

// Knex's own transactions leave them behind: a ROLLBACK that its query_timeout has taken from the queue, a busy connection after 5 s (hazards 3, 9).
describe('when the pool hands out a connection that is not clean', () => {
  const bench = useBench({ pool: { min: 0, max: 1 } });
  const insertOne: Handler = async (req, res) => {
    await insert(req.session, 'mine');
    res.status(201).end();
  };

  it("does not commit another's transaction with its own", async () => {
    await bench.knex.raw("begin; insert into items (name) values ('theirs')");
    const answer = await bench.answer(insertOne);
    if (answer.status === 201) expect(await bench.stored()).toEqual(['mine']);
    else expect(await bench.stored()).toEqual([]);
    expect((await bench.answer(async (req, res) => res.json(await req.session('items').count()))).status).toBe(200);
  });

  it("does not begin in another's failed transaction", async () => {
    await bench.knex.raw('begin');
    await bench.knex.raw('select 1/0').catch(() => {});
    const { status } = await bench.answer(insertOne);
    expect(await bench.stored()).toEqual(status === 201 ? ['mine'] : []);
    expect((await bench.answer(async (req, res) => res.json(await req.session('items').count()))).status).toBe(200);
  });

  it("does not wait behind another's statement", async () => {
    const { resource } = (bench.knex.client.pool as { free: { resource: Client }[] }).free[0] as { resource: Client };
    const theirs = resource.query('select pg_sleep(0.5)').catch(() => {});
    const begun = performance.now();
    await bench.answer(insertOne);
    expect(performance.now() - begun).toBeLessThan(450);
    await theirs;
  });
});

describe('when many requests end in every way', () => {
  const bench = useBench({ pool: { min: 0, max: 1 } });
  const ends: Handler[] = [
    (_req, res) => res.end(),
    (_req, res) => res.sendStatus(404),
    () => {
      throw new Error('of the app');
    },
    (req) => insert(req.session, 'bad'),
    async (req, res) => {
      await insert(req.session, 'bad').catch(() => {});
      res.end();
    },
    async (req, res) => {
      for await (const _ of req.session.raw('select generate_series(1, 1000)').stream()) break;
      res.end();
    },
    async (req, res) => {
      await req.session.transaction((trx) => insert(trx as Session, 'bad')).catch(() => {});
      res.end();
    },
  ];

  it('takes each connection once and gives it back once, and gathers no listeners on it (200 requests)', async () => {
    // The first session leaves its watch, for all that follow.
    await bench.answer(async (req, res) => {
      await insert(req.session, 'first');
      res.end();
    });
    const { pool } = bench.knex.client as { pool: { free: { resource: Client }[]; on(event: string, listener: () => void): void } };
    const client = pool.free[0]?.resource as Client;
    const emitters = [client, (client as unknown as { connection: Client }).connection];
    const listeners = () => emitters.map((emitter) => emitter.eventNames().map((name) => [String(name), emitter.listenerCount(name)]));
    const before = listeners();
    const counts = { acquireSuccess: 0, release: 0, destroySuccess: 0 };
    for (const event of Object.keys(counts) as (keyof typeof counts)[]) pool.on(event, () => counts[event]++);

    for (let i = 0; i < 200; i++) {
      await bench.answer(async (req, res, next) => {
        await insert(req.session, `${i}`);
        return ends[i % ends.length]?.(req, res, next);
      });
    }
    expect(counts).toEqual({ acquireSuccess: 200, release: 200, destroySuccess: 0 });
    expect(pool.free[0]?.resource).toBe(client);
    expect(listeners()).toEqual(before);
  });

  it('leaves none behind of streams that end before their turn, half read, and unread', async () => {
    const { pool } = bench.knex.client as { pool: { free: { resource: Client }[] } };
    const client = pool.free[0]?.resource as Client;
    const listeners = () => client.eventNames().map((name) => [String(name), client.listenerCount(name)]);
    const before = listeners();
    for (let i = 0; i < 5; i++) {
      await bench.answer(async (req, res) => {
        const stream = () => req.session.raw('select generate_series(1, 1000)').stream();
        await insert(req.session, `${i}`);
        for await (const _ of stream()) break;
        stream();
        stream().destroy();
        stream();
        res.end();
      });
    }
    expect(pool.free[0]?.resource).toBe(client);
    expect(listeners()).toEqual(before);
  });

  it('leaves none behind when the connection is destroyed', async () => {
    let client!: Client;
    await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      client = bench.held();
      res.end();
    });
    const before = client.listenerCount('error') + client.listenerCount('end');
    await bench.answer(async (req, res) => {
      await insert(req.session, 'b');
      await bench.kill();
      res.end();
    });
    expect(client.listenerCount('error') + client.listenerCount('end')).toBeLessThanOrEqual(before);
  });
});
