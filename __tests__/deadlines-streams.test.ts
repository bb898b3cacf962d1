import { setTimeout as sleep } from 'node:timers/promises';
import { withSession } from 'express-knex-session';
import { expectNothingTold, never, openSite, rejection } from './support/deadlines';
import { get, RawClient } from './support/http';
import { insert, useLedger } from './support/ledger';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();
const LIMIT = 150;
const rows = (count: number) => `SELECT generate_series(1, ${count}) AS i`;

describe('when a stream of the session moves', () => {
  it('extends the time: rows that are sent as slowly as the server gives them', async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        let count = 0;
        for await (const _row of req.session.raw('SELECT i, pg_sleep(0.03) FROM generate_series(1, 10) AS i').stream({ batchSize: 1 }))
          count++;
        res.send(`${count} rows`);
      },
      { transactionTimeout: LIMIT },
    );
    const begun = performance.now();
    expect(await site.get()).toMatchObject({ status: 200, body: '10 rows' });
    expect(performance.now() - begun).toBeGreaterThan(1.5 * LIMIT);
    expect(await ledger.stored()).toEqual(['a']);
  });

  it.each([
    ['for await', (stream: AsyncIterable<unknown>, work: () => Promise<unknown>) => readWith(stream, work)],
    [
      'a pipe',
      async (stream: NodeJS.ReadableStream, work: () => Promise<unknown>) => {
        const { Writable } = await import('node:stream');
        const { pipeline } = await import('node:stream/promises');
        let count = 0;
        await pipeline(
          stream,
          new Writable({
            objectMode: true,
            highWaterMark: 1,
            write(_row, _encoding, callback) {
              count++;
              work().then(() => callback(), callback);
            },
          }),
        );
        return count;
      },
    ],
  ])('extends the time up to the last row, by a reader that takes his time with each: %s', async (_how, read) => {
    const count = await withSession(
      ledger.knex,
      // All of them are in the buffers of the streams at once.
      (session) => read(session.raw(rows(14)).stream() as never, () => sleep(30)),
      { transactionTimeout: LIMIT },
    );
    expect(count).toBe(14);
  });

  it('counts anew from the last row', async () => {
    const error = await rejection(
      withSession(
        ledger.knex,
        async (session) => {
          for await (const _row of session.raw(rows(5)).stream());
          await session.raw('SELECT pg_sleep(10)');
        },
        { transactionTimeout: LIMIT },
      ),
    );
    expect(error).toMatchObject({ code: 'ERR_SESSION_TIMEOUT' });
  });
});

describe('when a stream of the session stands still', () => {
  it('ends it because its reader does not go on, with an error that says why', async () => {
    let told: any;
    const site = await openSite(
      ledger,
      async (req) => {
        try {
          for await (const _row of req.session.raw(rows(5000)).stream()) await Promise.race([never(), untilAborted(req.session.signal)]);
        } catch (error) {
          told = error;
          throw error;
        }
      },
      { transactionTimeout: LIMIT },
    );
    expect(await site.get()).toMatchObject({ status: 503, body: expect.stringContaining('ERR_SESSION_TIMEOUT') });
    await eventually(() => expect(told).toBeDefined());
    expect([told.code, told.cause?.code]).toContain('ERR_SESSION_TIMEOUT');
    expectNothingTold(told);
    // It is one error, and the client has heard of it.
    expect(site.errors).toHaveLength(1);
    await ledger.isClean();
  });

  it('ends it because the server does not go on', async () => {
    const error = await rejection(
      withSession(
        ledger.knex,
        async (session) => {
          for await (const _row of session.raw('SELECT i, pg_sleep(i * 10) FROM generate_series(0, 5) AS i').stream({ batchSize: 1 }));
        },
        { transactionTimeout: LIMIT },
      ),
    );
    expect(error).toMatchObject({ code: 'ERR_SESSION_TIMEOUT' });
    await ledger.isClean();
  });

  it('ends it because of a statement in its loop, which waits for its end', async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        for await (const row of req.session.raw(rows(5000)).stream()) {
          await insert(req, String((row as { i: number }).i));
          res.write('row');
        }
        res.end();
      },
      { transactionTimeout: LIMIT, commitAt: 'end' },
    );
    expect(await site.get()).toMatchObject({ status: 503, body: expect.stringContaining('ERR_SESSION_TIMEOUT') });
    expect(await ledger.stored()).toEqual([]);
  });
});

describe.each(['head', 'end'] as const)("when rows are streamed to a client (commitAt: '%s')", (commitAt) => {
  const stream = (count: number, transactionTimeout = LIMIT) =>
    openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        const aborted = untilAborted(req.session.signal);
        for await (const row of req.session.raw(`SELECT i, repeat('x', 2000) AS text FROM generate_series(1, ${count}) AS i`).stream()) {
          if (!res.write(JSON.stringify(row))) await Promise.race([new Promise((resolve) => res.once('drain', resolve)), aborted]);
          if (count < 100) await sleep(15);
        }
        res.end('end');
      },
      { commitAt, transactionTimeout },
    );

  it('lets one that reads on have all, however long that takes', async () => {
    const site = await stream(20);
    const answer = await site.get();
    expect(answer).toMatchObject({ status: 200, complete: true, body: expect.stringMatching(/end$/) });
    expect(await ledger.stored()).toEqual(['a']);
  });

  it('cuts off one that reads no more, rolls back, and gives the connection back', async () => {
    // Time enough for the first rows on a busy machine.
    const site = await stream(8_000, 500);
    const client = await RawClient.connect(site.port);
    client.get('/');
    await client.readUntil('xxx');
    client.pause();
    await eventually(() => expect(site.sessions.stats()).toMatchObject({ open: 0, rolledBack: 1 }));
    client.resume();
    await client.closed;
    expect(client.received).not.toMatch(/\r\n0\r\n\r\n$/);
    expect(site.reported).toMatchObject([{ code: 'ERR_SESSION_TIMEOUT' }]);
    expect(await ledger.stored()).toEqual([]);
    await ledger.isClean();
  });
});

// Hazard 44.
describe("with pg's pipeline mode", () => {
  const pipelined = () => ledger.pool({ connection: { connectionString: ledger.database.url, pipeline: true } as never });

  it('runs, commits and rolls back as always', async () => {
    const knex = pipelined();
    const site = await openSite(
      ledger,
      async (req, res) => {
        await Promise.all([insert(req, `${req.path}a`), insert(req, `${req.path}b`)]);
        res.sendStatus(req.path === '/good' ? 201 : 409);
      },
      { knex },
    );
    expect([(await get(`${site.url}/good`)).status, (await get(`${site.url}/bad`)).status]).toEqual([201, 409]);
    expect(await ledger.stored()).toEqual(['/gooda', '/goodb']);
  });

  it('cancels a statement whose time has passed, and the pool lives on', async () => {
    const knex = pipelined();
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        if (req.path === '/slow') await req.session.raw('SELECT pg_sleep(10)');
        res.status(201).end();
      },
      { knex, transactionTimeout: LIMIT },
    );
    expect((await get(`${site.url}/slow`)).status).toBe(503);
    expect((await get(`${site.url}/fast`)).status).toBe(201);
    expect(await ledger.stored()).toEqual(['a']);
  });

  it('tells of a stream what the driver says, and does not hang: it refuses them', async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        for await (const _row of req.session.raw(rows(5)).stream());
        res.end();
      },
      { knex: pipelined(), transactionTimeout: 1_000 },
    );
    expect((await site.get()).status).toBe(500);
    expect(site.errors).toMatchObject([{ message: expect.stringContaining('not supported in pipeline mode') }]);
    expect(await ledger.stored()).toEqual([]);
  });
});

function untilAborted(signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => (signal.aborted ? resolve() : signal.addEventListener('abort', () => resolve(), { once: true })));
}

async function readWith(stream: AsyncIterable<unknown>, work: () => Promise<unknown>): Promise<number> {
  let count = 0;
  for await (const _row of stream) {
    count++;
    await work();
  }
  return count;
}
