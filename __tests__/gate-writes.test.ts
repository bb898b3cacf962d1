import { once } from 'node:events';
import { join } from 'node:path';
import { pipeline as pipelineWithCallback, Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { useGatedApps } from './support/gated-app';
import { RawClient, request } from './support/http';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { attempt, type Cases, expectSameAsPlain, inserting, listed, requestFor, stateOf } from './support/wire-comparison';

failOnWarnings();

const apps = useGatedApps();

const LARGE = 'x'.repeat(1_000_000);
const FILE = join(__dirname, '../package-lock.json');

const writes: Cases = {
  'write and end': (_req, res) => {
    res.write('a');
    res.end('b');
  },
  'callbacks of write and end': (_req, res, note) => {
    res.write('a', () => note('first'));
    res.write('ä', 'latin1', () => note('second'));
    res.write(Buffer.from('c'), () => note('third'));
    res.end('d', () => note('end'));
    note(stateOf(res));
  },
  'an awaited callback of write': async (_req, res, note) => {
    await new Promise((resolve) => res.write('a', resolve));
    note('written');
    res.end('b');
  },
  'an empty write': (_req, res) => {
    res.write('');
    res.end('b');
  },
  'a Content-Length': (_req, res) => {
    res.set('Content-Length', '3');
    res.write('a');
    res.end('bc');
  },
  'state between write and end': (_req, res, note) => {
    res.write('a');
    note(stateOf(res));
    note(attempt(() => res.setHeader('X-A', '1')));
    note(attempt(() => res.writeHead(201)));
    res.status(404);
    res.end('b');
  },
  trailers: (_req, res) => {
    res.set('Trailer', 'X-Sum');
    res.write('a');
    res.addTrailers({ 'X-Sum': '1' });
    res.end();
  },
  flushHeaders: (_req, res, note) => {
    res.flushHeaders();
    note(stateOf(res));
    note(attempt(() => res.setHeader('X-A', '1')));
    res.write('a');
    res.end('b');
  },
  'flushHeaders twice': (_req, res) => {
    res.flushHeaders();
    res.flushHeaders();
    res.end('b');
  },
  pipe: (_req, res) => {
    Readable.from([LARGE, LARGE, 'end']).pipe(res);
  },
  'pipeline with a callback': (_req, res, note) => {
    pipelineWithCallback(Readable.from([LARGE, LARGE, 'end']), res, (error) => note(['done', error]));
  },
  'pipeline of a stream': async (_req, res, note) => {
    await pipeline(Readable.from([LARGE, LARGE, 'end']), res);
    note('done');
  },
  'pipeline of a generator': async (_req, res, note) => {
    await pipeline(async function* () {
      yield 'small';
      yield LARGE;
      yield 'end';
    }, res);
    note('done');
  },
  'writes that wait for drain': async (_req, res, note) => {
    for (let i = 0; i < 5; i++) if (!res.write(LARGE)) await once(res, 'drain');
    res.end(() => note('end'));
  },
  'HTTP/1.0': [
    (_req, res) => {
      res.write('a');
      res.end('b');
    },
    { request: 'GET / HTTP/1.0\r\n\r\n', isLast: true },
  ],
  'HTTP/1.0 with keep-alive': [
    (_req, res) => {
      res.set('Content-Length', '2').write('a');
      res.end('b');
    },
    { request: 'GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n' },
  ],
  'Connection: close': [
    (_req, res) => {
      res.write('a');
      res.end('b');
    },
    { request: requestFor('GET', 'Connection: close'), isLast: true },
  ],
};

describe('when a response is written in parts', () => {
  it.each(listed(writes))(
    'sends not one byte before COMMIT, and then what plain Express sends: %s (39)',
    async (_name, handler, options) => {
      await expectSameAsPlain(apps, inserting(handler), options);
      expect(await apps.names()).toEqual(['entry', 'entry']);
    },
  );

  it.each([[400], [500]])('rolls back first if its status is %d (10)', async (status) => {
    await expectSameAsPlain(
      apps,
      inserting((_req, res) => {
        res.status(status).write('a');
        res.end('b');
      }),
      { endsWith: 'ROLLBACK' },
    );
    expect(await apps.names()).toEqual(['entry']);
  });
});

describe('when a response that is written in parts has to wait for COMMIT', () => {
  it.each<[string, 'on' | 'once' | 'addListener' | 'prependListener' | 'prependOnceListener', 'before' | 'after']>([
    ['added after it', 'once', 'after'],
    ['added after it with on', 'on', 'after'],
    ['added after it with addListener', 'addListener', 'after'],
    ['added after it in front', 'prependListener', 'after'],
    ['added after it in front, once', 'prependOnceListener', 'after'],
    ['added before it', 'on', 'before'],
    ['added before it, once', 'once', 'before'],
  ])('answers false to a write, and wakes a listener once that was %s', async (_name, method, when) => {
    const seen: unknown[] = [];
    const { url } = await apps.gated(async (req, res) => {
      await req.session('entries').insert({ name: 'entry' });
      const onDrain = () => {
        seen.push('drain');
        res.end('b');
      };
      if (when === 'before') res[method]('drain', onDrain);
      seen.push(res.write('a'));
      if (when === 'after') res[method]('drain', onDrain);
    });
    expect(await request(url)).toMatchObject({ status: 200, body: 'ab', complete: true });
    expect(seen).toEqual([false, 'drain']);
  });

  it('reads true for writableNeedDrain until then', async () => {
    const seen: unknown[] = [];
    const { url } = await apps.gated(async (req, res) => {
      await req.session('entries').insert({ name: 'entry' });
      res.write('a');
      seen.push(res.writableNeedDrain);
      await once(res, 'drain');
      seen.push(res.writableNeedDrain);
      res.end();
    });
    expect(await request(url)).toMatchObject({ body: 'a', complete: true });
    expect(seen).toEqual([true, false]);
  });

  it('does not read on from a source that is piped into it', async () => {
    let read = 0;
    const { port, sockets } = await apps.gated(async (req, res) => {
      await req.session('entries').insert({ name: 'entry' });
      const chunk = Buffer.alloc(64_000);
      const source = new Readable({
        highWaterMark: 64_000,
        read() {
          this.push(++read > 100 ? null : chunk);
        },
      });
      source.pipe(res);
    });
    const hold = apps.hold();
    const client = await RawClient.connect(port);
    client.get('/', 'Connection: close');
    await hold.reached;
    expect(sockets[0]?.bytesWritten).toBe(0);
    expect(read).toBeLessThan(5);
    hold.release();
    await client.closed;
    expect(client.received.length).toBeGreaterThan(6_400_000);
  });
});

describe('when the client reads slowly', () => {
  const CHUNK = Buffer.alloc(64_000, 'x');
  const COUNT = 400;

  it.each<[string, (res: import('express').Response, read: () => Buffer | null) => unknown]>([
    [
      'pipe',
      (res, read) =>
        new Readable({
          read() {
            this.push(read());
          },
        }).pipe(res),
    ],
    ['sendFile', (res) => res.sendFile(FILE)],
    [
      'one large end',
      (res, read) => {
        while (read());
        res.end(Buffer.concat(Array<Buffer>(COUNT).fill(CHUNK)));
      },
    ],
  ])('holds no connection meanwhile, and no more memory than the buffers: %s (44, hazard 30)', async (name, answer) => {
    let read = 0;
    const { port } = await apps.gated(async (req, res) => {
      await req.session('entries').insert({ name: 'entry' });
      answer(res, () => (++read > COUNT ? null : CHUNK));
    });
    const client = await RawClient.connect(port);
    client.pause().get('/', 'Connection: close');
    await eventually(async () => expect(await apps.names()).toEqual(['entry']));
    await eventually(() => expect(poolUsage(apps.knex).used).toBe(0));
    // The kernel's buffers take a few megabytes, Node's own 64 kB at most.
    if (name === 'pipe') expect(read).toBeLessThan(COUNT / 2);
    client.resume();
    await client.closed;
    if (name !== 'sendFile') expect(client.received.length).toBeGreaterThan(CHUNK.length * COUNT);
  });
});
