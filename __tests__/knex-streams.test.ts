import { once } from 'node:events';
import { PassThrough, Transform, Writable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import express from 'express';
import { getSession, sessionMiddleware, withSession } from 'express-knex-session';
import { listen, RawClient } from './support/http';
import { inRequest, inSession, insert, Ledger, plainly, type Use } from './support/knex';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = Ledger.forTests();

const MANY = 'select i from generate_series(1, 1000) i';
/** Fails at its 600th row, when some have come. */
const FAILS_LATE = 'select 1 / (600 - i) from generate_series(1, 1000) i';

class Collector extends Writable {
  readonly rows: any[] = [];
  constructor() {
    super({ objectMode: true });
  }
  override _write(row: unknown, _encoding: unknown, done: () => void): void {
    this.rows.push(row);
    done();
  }
}

/** Reads rows to the end, to an error, or until there are enough. */
async function read(stream: AsyncIterable<unknown>, enough = Number.POSITIVE_INFINITY): Promise<unknown> {
  const rows: unknown[] = [];
  let error: unknown;
  try {
    for await (const row of stream) if (rows.push(row) >= enough) break;
  } catch (thrown) {
    error = thrown;
  }
  return { rows: rows.length, first: rows[0], error };
}

const uses: Use[] = [
  { name: 'for await', run: (trx) => read(trx('people').orderBy('id').stream()) },
  { name: 'for await over many rows', run: (trx) => read(trx.raw(MANY).stream()) },
  { name: 'for await with options', run: (trx) => read(trx.raw(MANY).stream({ highWaterMark: 2 })) },
  { name: 'for await that breaks early', run: (trx) => read(trx.raw(MANY).stream(), 3) },
  {
    name: 'for await that breaks early, and statements after it',
    run: async (trx) => [await read(trx.raw(MANY).stream({ highWaterMark: 2 }), 3), await insert(trx, 'x'), await trx('people').count()],
  },
  { name: 'rows written before in the same transaction', run: async (trx) => [await insert(trx, 'x'), await read(trx('people').stream())] },
  {
    name: 'statements inside for await',
    run: async (trx) => {
      for await (const { id } of trx('people').orderBy('id').stream()) await trx('payments').insert({ person_id: id, amount: id });
    },
  },
  {
    name: 'two streams, one after the other',
    run: async (trx) => [await read(trx.raw(MANY).stream()), await read(trx('people').stream())],
  },
  { name: 'two streams at once', run: (trx) => Promise.all([read(trx.raw(MANY).stream()), read(trx('people').stream())]) },
  {
    name: 'a stream in a savepoint',
    run: (trx) => trx.transaction(async (inner) => [await insert(inner, 'x'), await read(inner('people').stream())]),
  },
  {
    name: 'a stream of the root knex with transacting',
    run: async (trx, knex) => [await insert(trx, 'x'), await read(knex('people').transacting(trx).stream())],
  },
  {
    name: 'pipe into a stream',
    run: async (trx) => {
      const collector = new Collector();
      await pipeline(trx('people').orderBy('id').stream(), collector);
      return collector.rows;
    },
  },
  {
    name: 'pipe() of the builder',
    run: async (trx) => {
      const collector = new Collector();
      trx('people').orderBy('id').pipe(collector);
      await once(collector, 'finish');
      return collector.rows;
    },
  },
  {
    name: 'a handler',
    run: async (trx) => {
      const collector = new Collector();
      const result = await trx('people')
        .orderBy('id')
        .stream((stream) => void stream.pipe(collector));
      return [result, collector.rows];
    },
  },
  {
    name: 'data events',
    run: async (trx) => {
      const stream = trx('people').orderBy('id').stream();
      const rows: unknown[] = [];
      stream.on('data', (row: unknown) => rows.push(row));
      await once(stream, 'end');
      return rows;
    },
  },
  {
    name: 'a stream that is destroyed in the middle, and a statement after it',
    run: async (trx) => {
      const stream = trx.raw(MANY).stream({ highWaterMark: 2 });
      await once(stream, 'data');
      stream.destroy();
      await once(stream, 'close');
      return insert(trx, 'x');
    },
  },
  {
    name: 'a stream that is destroyed with an error',
    run: async (trx) => {
      const stream = trx.raw(MANY).stream({ highWaterMark: 2 });
      await once(stream, 'data');
      const [[error]] = await Promise.all([once(stream, 'error'), stream.destroy(new RangeError('enough'))]);
      return [error, await insert(trx, 'x')];
    },
  },
  {
    name: 'a pipe whose end fails',
    run: async (trx) => {
      const stream = trx.raw(MANY).stream({ highWaterMark: 2 });
      const sink = new PassThrough({ objectMode: true });
      const done = pipeline(stream, sink).catch((error) => error);
      sink.destroy(new RangeError('full'));
      return [await done, await insert(trx, 'x')];
    },
  },
  {
    name: 'a statement that is refused',
    run: (trx) => trx.transaction(async (inner) => Promise.reject(await read(inner('nothing').stream()))).catch((seen) => seen),
  },
  {
    name: 'a statement that is refused, rethrown',
    fails: true,
    run: async (trx) => {
      for await (const row of trx('nothing').stream()) throw row;
    },
  },
  {
    name: 'an error in the middle',
    run: (trx) => trx.transaction(async (inner) => Promise.reject(await read(inner.raw(FAILS_LATE).stream()))).catch((seen) => seen),
  },
  {
    name: 'an error in the middle, rethrown',
    fails: true,
    run: async (trx) => {
      await insert(trx, 'x');
      for await (const _row of trx.raw(FAILS_LATE).stream());
    },
  },
  {
    name: 'an error in the middle of a pipe',
    fails: true,
    run: (trx) => pipeline(trx.raw(FAILS_LATE).stream(), new Collector()),
  },
  {
    name: 'a statement that is refused, with a handler',
    run: async (trx) => {
      const refused = trx.transaction(async (inner) => {
        let seen: unknown;
        await inner('nothing').stream((stream) => {
          seen = read(stream);
        });
        throw await seen;
      });
      return refused.catch((seen) => seen);
    },
  },
  {
    name: 'an undefined binding',
    run: (trx) =>
      trx.transaction(async (inner) =>
        read(
          inner('people')
            .where('id', undefined as never)
            .stream(),
        ),
      ),
  },
];

describe('when a session streams rows, it does what knex.transaction() does, for', () => ledger.comparesWithKnex(uses));

describe('when rows are processed on their way', () => {
  it.each(Object.entries({ plainly, inSession, inRequest }))('calls postProcessResponse for each row: %s', async (_name, way) => {
    const knex = ledger.connect({ postProcessResponse: (row, context) => (row.id ? `${row.name} ${context}` : row) });
    const rows: unknown[] = [];
    await way(knex, async (trx) => {
      for await (const row of trx('people').orderBy('id').queryContext('seen').stream()) rows.push(row);
    });
    expect(rows).toEqual(['Ann seen', 'Bob seen', 'Cid seen']);
  });
});

describe('when a stream is destroyed before it has begun', () => {
  it.each(Object.entries({ plainly, inSession, inRequest }))(
    'lets what comes after it run: %s',
    async (_name, way) => {
      await way(ledger.knex, async (trx) => {
        for (const name of ['x', 'y']) {
          const stream = trx.raw(MANY).stream();
          stream.destroy();
          await once(stream, 'close');
          await insert(trx, name);
        }
      });
      expect(await ledger.names()).toEqual(['Ann', 'Bob', 'Cid', 'x', 'y']);
    },
    5_000,
  );
});

describe('when a stream of a session has gone wrong', () => {
  it("tells the stream's reader once, and the session rolls back", async () => {
    const errors: unknown[] = [];
    const work = withSession(ledger.knex, async (session) => {
      await insert(session, 'x');
      const stream = session.raw(FAILS_LATE).stream();
      stream.on('error', (error: unknown) => errors.push(error));
      stream.resume();
      await new Promise((resolve) => stream.once('close', resolve));
    });

    await expect(work).rejects.toMatchObject({ code: 'ERR_TRANSACTION_ABORTED' });
    expect(errors).toEqual([expect.objectContaining({ code: '22012' })]);
    await expect(work).rejects.toMatchObject({ cause: errors[0] });
    expect(await ledger.names()).toEqual(['Ann', 'Bob', 'Cid']);
  });

  it('refuses a stream after the end of the session, by an error on the stream', async () => {
    const session = await withSession(ledger.knex, async (session) => session);

    expect(await read(session('people').stream())).toMatchObject({ rows: 0, error: { code: 'ERR_SESSION_CLOSED' } });
  });

  it.each(Object.entries({ inSession, inRequest }))(
    'neither hangs nor leaks when a stream is opened and not read: %s',
    async (_name, way) => {
      await way(ledger.knex, async (trx) => {
        trx.raw(MANY).stream();
      });

      expect(poolUsage(ledger.knex)).toMatchObject({ used: 0 });
    },
    5_000,
  );

  it.each(Object.entries({ inSession, inRequest }))(
    'neither hangs nor leaks when a stream is begun and not read: %s',
    async (_name, way) => {
      await way(ledger.knex, (trx) => once(trx.raw(MANY).stream({ highWaterMark: 2 }), 'readable').then(() => {}));

      expect(poolUsage(ledger.knex)).toMatchObject({ used: 0 });
    },
    5_000,
  );
});

describe('when a client leaves while rows of the session are piped to it', () => {
  it('ends the stream, rolls back and returns the connection, and the process lives', async () => {
    const asLines = new Transform({ writableObjectMode: true, transform: (row, _encoding, done) => done(null, `${row.line}\n`) });
    const app = express()
      .use(sessionMiddleware(ledger.knex))
      .get('/', async (req, res) => {
        await insert(getSession(req), 'x');
        getSession(req).raw("select repeat('x', 1000) as line from generate_series(1, 100000)").stream().pipe(asLines).pipe(res);
      });
    const server = await listen(app);
    const client = await RawClient.connect(server.port);

    await client.get('/').readUntil('xxx\n');
    await client.reset();

    await eventually(() => expect(poolUsage(ledger.knex)).toMatchObject({ used: 0 }));
    expect(await ledger.names()).toEqual(['Ann', 'Bob', 'Cid']);
    await server.close();
  }, 5_000);
});
