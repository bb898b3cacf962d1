import { once } from 'node:events';
import { Transform } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { stringify } from 'csv-stringify';
import type { Request, Response } from 'express';
import { type AppOptions, REFUSED, useGatedApps } from './support/gated-app';
import { RawClient } from './support/http';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { requestFor } from './support/wire-comparison';

failOnWarnings();

const apps = useGatedApps();

interface Row {
  i: number;
}

/** `count` rows, the last of which is a division by zero if it is to fail. */
const rowsOf = (req: Request, count: number, fails = false) =>
  req.session
    .select(req.session.raw('i + 0 / (?::int - i) AS i', [fails ? count : -1]))
    .from(req.session.raw('generate_series(1, ?) i', [count]))
    .stream();

type Work = (req: Request, res: Response, count: number, fails?: boolean) => Promise<unknown>;

const SLOW = 'for await, something slow, and write';

/** Ways to send the rows of a stream of the session. */
const ways: Record<string, Work> = {
  'for await and write': async (req, res, count, fails) => {
    for await (const row of rowsOf(req, count, fails)) {
      if (!res.write(`${(row as Row).i}\n`)) await once(res, 'drain');
    }
    res.end();
  },
  [SLOW]: async (req, res, count, fails) => {
    for await (const row of rowsOf(req, count, fails)) {
      if ((row as Row).i < 3) await nextTurn();
      if (!res.write(`${(row as Row).i}\n`)) await once(res, 'drain');
    }
    res.end();
  },
  'pipeline through a transform': async (req, res, count, fails) => {
    const toText = new Transform({ writableObjectMode: true, transform: (row: Row, _encoding, callback) => callback(null, `${row.i}\n`) });
    await pipeline(rowsOf(req, count, fails), toText, res);
  },
  'pipeline through CSV': async (req, res, count, fails) => {
    await pipeline(rowsOf(req, count, fails), stringify(), res);
  },
  'pipe through CSV': (req, res, count, fails) =>
    new Promise((resolve, reject) => {
      res.once('close', resolve);
      rowsOf(req, count, fails).once('error', reject).pipe(stringify()).pipe(res);
    }),
  'pipeline through a generator': async (req, res, count, fails) => {
    await pipeline(
      rowsOf(req, count, fails),
      async function* (rows) {
        for await (const row of rows) yield `${(row as Row).i}\n`;
      },
      res,
    );
  },
};

const SIZES = [1, 2, 17, 3_000];
const table = Object.keys(ways).flatMap((way) => SIZES.map((count) => [way, count] as const));

/** Inserts, streams, and gives what the client has received when the connection has ended. */
async function stream(
  name: string,
  work: (req: Request, res: Response) => unknown,
  options: AppOptions = {},
  request = requestFor('GET', 'Connection: close'),
) {
  const seen: unknown[] = [];
  const { port } = await apps.gated(
    async (req, res) => {
      await req.session('entries').insert({ name });
      return work(req, res);
    },
    {
      errorHandlers: [
        (error, _req, res, next) => {
          seen.push(error.code);
          if (res.headersSent) next(error);
          else res.status(500).send('sorry');
        },
      ],
      ...options,
    },
  );
  const client = await RawClient.connect(port);
  const error = await client.write(request).closed;
  await eventually(() => expect(poolUsage(apps.knex).used).toBe(0));
  return { received: client.received, error, seen };
}

describe("when rows of the session's own stream are sent", () => {
  it.each(table)('sends them all, and commits before the end: %s, %d rows (42)', async (way, count) => {
    const { received, error, seen } = await stream('entry', (req, res) => ways[way]?.(req, res, count));
    expect(seen).toEqual([]);
    expect(error).toBeUndefined();
    expect(received).toMatch(/^HTTP\/1.1 200 OK.*0\r\n\r\n$/s);
    const body = received.slice(received.indexOf('\r\n\r\n') + 4);
    const text = body
      .split('\r\n')
      .filter((_line, i) => i % 2 === 1)
      .join('');
    expect(text.trim().split('\n').map(Number)).toEqual(Array.from({ length: count }, (_, i) => i + 1));
    expect(await apps.names()).toEqual(['entry']);
  });

  it.each(table)('never looks like a success if COMMIT fails: %s, %d rows (19, 42)', async (way, count) => {
    const { received, error } = await stream(REFUSED, (req, res) => ways[way]?.(req, res, count));
    const wasReplaced = /^HTTP\/1.1 500 .*sorry$/s.test(received);
    const wasReset = error?.code === 'ECONNRESET' && !received.endsWith('0\r\n\r\n');
    expect({ wasReplaced, wasReset }).toEqual({ wasReplaced: !wasReset, wasReset: !wasReplaced });
    // Told to the error handlers, or to onError: once.
    expect(apps.reported).toEqual(wasReset ? [expect.objectContaining({ code: '23514' })] : []);
    expect(await apps.names()).toEqual([]);
  });

  it.each(table)('never looks like a success if the stream fails: %s, %d rows (43)', async (way, count) => {
    const { received, seen } = await stream('entry', (req, res) => ways[way]?.(req, res, count, true));
    expect(received).not.toMatch(/^HTTP\/1.1 200 OK.*0\r\n\r\n$/s);
    expect(seen.length + apps.reported.length).toBeGreaterThanOrEqual(1);
    expect(await apps.names()).toEqual([]);
  });
});

describe("when a statement follows on the session's own stream", () => {
  const streamThenInsert = (way: string, count: number) =>
    stream('entry', async (req, res) => {
      // The response stays open for one more line.
      const end = res.end.bind(res);
      const ended = new Promise<void>((resolve) => {
        res.end = ((chunk?: unknown) => {
          if (typeof chunk === 'string' || chunk instanceof Uint8Array) res.write(chunk);
          resolve();
          return res;
        }) as typeof res.end;
      });
      void ways[way]?.(req, res, count).catch(() => {});
      await ended;
      res.end = end;
      await req.session('entries').insert({ name: 'afterwards' });
      res.end('0\n');
    });

  it.each(table.filter(([way, count]) => !(way === SLOW && count === 1)))(
    'runs it, however many rows there were: %s, %d rows',
    async (way, count) => {
      const { received, seen } = await streamThenInsert(way, count);
      expect(seen).toEqual([]);
      expect(received).toMatch(/^HTTP\/1.1 200 OK.*0\r\n\r\n$/s);
      expect(await apps.names()).toEqual(['entry', 'afterwards']);
    },
  );

  // A limit: by then the stream is not being read any more. commitAt: 'end' is for that.
  it('refuses it by name if all rows had been read before the first byte was written', async () => {
    const { received, seen } = await streamThenInsert(SLOW, 1);
    expect(seen).toEqual(['ERR_SESSION_CLOSED']);
    expect(received).not.toMatch(/0\r\n\r\n$/);
    expect(await apps.names()).toEqual(['entry']);
  });
});

describe("when the session's own stream is abandoned", () => {
  it.each([1, 5, 3_000])('ends the request without waiting for the %d rows, and says what became of it', async (count) => {
    const { received } = await stream('entry', (req, res) => {
      rowsOf(req, count);
      res.json({ ok: true });
    });
    expect(received).toMatch(/^HTTP\/1.1 200 OK.*\{"ok":true\}$/s);
    expect(await apps.names()).toEqual(['entry']);
  });

  it.each([1, 5, 3_000])('runs the next statement if it is destroyed at once, with %d rows to come', async (count) => {
    const { received } = await stream('entry', async (req, res) => {
      const rows = rowsOf(req, count);
      await nextTurn();
      rows.destroy();
      res.json(await req.session('entries').pluck('name'));
    });
    expect(received).toMatch(/^HTTP\/1.1 200 OK.*\["entry"\]$/s);
    expect(await apps.names()).toEqual(['entry']);
  });

  it.each([4, 3_000])('ends the request if a loop over its %d rows is left early', async (count) => {
    const { received } = await stream('entry', async (req, res) => {
      for await (const row of rowsOf(req, count)) {
        res.write(`${(row as Row).i}\n`);
        if ((row as Row).i === 3) break;
      }
      res.end();
    });
    expect(received).toMatch(/1\n.*2\n.*3\n.*0\r\n\r\n$/s);
    expect(await apps.names()).toEqual(['entry']);
  });

  it('rolls back if the client goes away in the middle', async () => {
    const { port } = await apps.gated(async (req, res) => {
      await req.session('entries').insert({ name: 'entry' });
      await pipeline(rowsOf(req, 1_000_000), stringify(), res).catch(() => {});
    });
    const client = await RawClient.connect(port);
    await client.get('/').readUntil('100\n');
    await client.reset();
    await eventually(() => expect(poolUsage(apps.knex).used).toBe(0), 5_000);
    expect(await apps.names()).toEqual([]);
  });
});
