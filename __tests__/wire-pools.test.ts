import pg from 'pg';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { type Bench, deferred, isSql, sent, spoil, useBench } from './support/wire';

failOnWarnings();

const GROUP = 'P(BEGIN;) B E P(insert into "items" ("name") values ($1)) B D E S Q(COMMIT;)';

async function storesOneItem(bench: Bench): Promise<void> {
  const answer = await bench.answer(async (req, res) => {
    await req.session('items').insert({ name: 'a' });
    res.status(201).end();
  });
  expect(answer).toMatchObject({ status: 201, body: '' });
  expect(await bench.stored()).toEqual(['a']);
}

describe('when the pool keeps no connection open', () => {
  const bench = useBench({ pool: { min: 0, max: 1, idleTimeoutMillis: 1, reapIntervalMillis: 1 } });

  it('opens one for the first statement only', async () => {
    await eventually(() => expect(bench.proxy.connections()).toBe(0));
    bench.proxy.reset();
    await bench.answer((_req, res) => res.end());
    expect(bench.proxy.connections()).toBe(0);

    await storesOneItem(bench);
    expect(sent(bench.proxy).replace(/ X$/, '')).toBe(GROUP);
    await eventually(() => expect(poolUsage(bench.knex)).toEqual({ used: 0, free: 0, pendingAcquires: 0 }));
  });
});

describe("when Knex works on pg's own pool", () => {
  let pool: pg.Pool;
  const bench = useBench((url) => {
    pool = new pg.Pool({ connectionString: url, max: 2 });
    return pool;
  });
  const usage = () => ({ open: pool.totalCount, used: pool.totalCount - pool.idleCount, waiting: pool.waitingCount });
  afterEach(() => eventually(() => expect(usage()).toMatchObject({ used: 0, waiting: 0 })));

  it('sends BEGIN with the first statement all the same', async () => {
    await storesOneItem(bench);
    expect(sent(bench.proxy)).toBe(GROUP);
  });

  it('gives the connection back, and takes it again', async () => {
    for (let i = 0; i < 5; i++) {
      await bench.answer(async (req, res) => {
        await req.session('items').insert({ name: `${i}` });
        res.sendStatus(i % 2 ? 400 : 201);
      });
    }
    expect(await bench.stored()).toEqual(['0', '2', '4']);
    expect(pool.totalCount).toBe(1);
  });

  it('survives a backend that is killed while a session holds its connection (hazard 7)', async () => {
    const killed = deferred<pg.PoolClient>();
    pool.once('acquire', killed.resolve);
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      const connection = await killed.promise;
      const gone = new Promise((resolve) => connection.once('end', resolve));
      await bench.terminate(connection);
      await gone;
      res.end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: '57P01' }]);
    expect(pool.totalCount).toBe(0);
    await storesOneItem(bench);
  });

  it('destroys a connection that is not clean, and only that one', async () => {
    bench.proxy.onFrontend((message) => {
      if (isSql(message, 'ROLLBACK')) spoil(message);
    });
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      res.sendStatus(409);
    });
    expect(answer.status).toBe(409);
    expect(bench.reported).toMatchObject([{ code: '42601' }]);
    expect(pool.totalCount).toBe(0);
    bench.proxy.onFrontend(undefined);
    await storesOneItem(bench);
    expect(pool.totalCount).toBe(1);
  });

  it('gives the connection back to it even if knex has let go of it meanwhile', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      // Knex does not own this pool: destroy() only forgets it, at once.
      await bench.knex.destroy();
      res.status(201).end();
    });
    bench.knex.initialize();
    expect(await bench.stored()).toEqual(['a']);
    expect(answer.status).toBe(201);
    expect(usage()).toEqual({ open: 1, used: 0, waiting: 0 });
  });

  it('leaves no listener of its own on the connection, over 50 requests', async () => {
    const client = await pool.connect();
    const count = () => client.eventNames().map((name) => [name, client.listenerCount(name)]);
    client.release();
    const before = count();
    for (let i = 0; i < 50; i++) {
      await bench.answer(async (req, res) => {
        await req.session.select(1);
        if (i % 2) await req.session.raw('select 1/0').catch(() => {});
        res.sendStatus(i % 2 ? 400 : 200);
      });
    }
    expect(pool.totalCount).toBe(1);
    expect(count()).toEqual(before);
  });
});

describe("when the connections are in pg's pipeline mode", () => {
  const bench = useBench((url) => ({ connection: { connectionString: url, pipeline: true } as never }));

  it('sends BEGIN with the first statement all the same', async () => {
    await storesOneItem(bench);
    expect(sent(bench.proxy)).toBe(GROUP);
  });

  it('rolls back after an error', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      await req.session('items').insert({ name: 'bad' });
      res.end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: '23514' }]);
    expect(await bench.stored()).toEqual([]);
    expect(poolUsage(bench.knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 });
  });

  it('runs statements that were issued together in their order', async () => {
    const names = Array.from({ length: 10 }, (_, i) => `${i}`);
    await bench.answer(async (req, res) => {
      await Promise.all(names.map((name) => req.session('items').insert({ name })));
      res.end();
    });
    expect(await bench.stored()).toEqual(names);
  });

  it("passes on pg's refusal of a stream, and neither hangs nor loses the connection", async () => {
    const answer = await bench.answer(async (req, res) => {
      for await (const row of req.session('items').stream()) res.write(row);
      res.end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ message: expect.stringContaining('not supported in pipeline mode') }]);
    await storesOneItem(bench);
  });
});

describe('when the connections ask for binary results', () => {
  const bench = useBench((url) => ({ connection: { connectionString: url, binary: true } as never }));
  const value = '00000000-0000-0000-0000-000000000001';

  it('reads the first statement as any later one', async () => {
    let first: unknown;
    let second: unknown;
    const select = `select '${value}'::uuid as id, 1.5::numeric as n`;
    await bench.answer(async (req, res) => {
      first = (await req.session.raw(select)).rows;
      second = (await req.session.raw(select)).rows;
      res.end();
    });
    expect(second).toEqual([{ id: value, n: '1.5' }]);
    expect(first).toEqual(second);
  });
});

describe('when the connections have type parsers of their own', () => {
  const types = { getTypeParser: (oid: number) => (text: string) => (oid === 23 ? `int ${text}` : text) };
  const bench = useBench((url) => ({ connection: { connectionString: url, types } as never }));

  it('uses them for the first statement as for any later one', async () => {
    const results: unknown[] = [];
    await bench.answer(async (req, res) => {
      for (let i = 0; i < 2; i++) results.push((await req.session.raw('select 1 as n')).rows);
      res.end();
    });
    expect(results).toEqual([[{ n: 'int 1' }], [{ n: 'int 1' }]]);
  });
});

describe('when the driver limits the time of a query', () => {
  const bench = useBench((url) => ({ connection: { connectionString: url, query_timeout: 5_000 } as never }));

  it('sends BEGIN with the first statement all the same', async () => {
    await storesOneItem(bench);
    expect(sent(bench.proxy)).toBe(GROUP);
  });
});

describe("when a client of pg's own pool is lost that no session holds", () => {
  let pool: pg.Pool;
  const bench = useBench((url) => {
    pool = new pg.Pool({ connectionString: url, max: 1 });
    pool.on('error', () => {});
    return pool;
  });

  it('is as without sessions: an uncaught exception for who has checked it out without a listener (hazard 7)', async () => {
    await storesOneItem(bench);
    const client = await pool.connect();
    expect(client.listenerCount('error')).toBe(1);
    expect(() => client.emit('error', new Error('lost'))).toThrow('lost');

    const heard: Error[] = [];
    client.once('error', (error) => heard.push(error));
    client.emit('error', new Error('lost'));
    expect(heard).toMatchObject([{ message: 'lost' }]);
    client.release(true);
  });
});
