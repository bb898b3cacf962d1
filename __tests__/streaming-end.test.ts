import { once } from 'node:events';
import { join } from 'node:path';
import { pipeline, Readable } from 'node:stream';
import type { Request, Response } from 'express';
import { deferred, REFUSED, useGatedApps } from './support/gated-app';
import { RawClient } from './support/http';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { requestFor, withoutDates } from './support/wire-comparison';

failOnWarnings();

const apps = useGatedApps();

interface StreamedCase {
  handler: (req: Request, res: Response) => unknown;
  /** What the client has after the head, before COMMIT; undefined if not even the head has come. */
  before: string | undefined;
  request?: string;
}

const SMALL_FILE = join(__dirname, '../LICENSE');
const HTTP_10 = 'GET / HTTP/1.0\r\n\r\n';

/** One call after the other, so that nothing is taken together. */
const inSteps =
  (...steps: ((res: Response) => unknown)[]) =>
  async (_req: Request, res: Response) => {
    for (const step of steps) {
      step(res);
      await new Promise((resolve) => setImmediate(resolve));
    }
  };
const write = (text: string) => (res: Response) => res.write(text);
const end = (text?: string) => (res: Response) => res.end(text);
const length = (value: number) => (res: Response) => res.set('Content-Length', String(value));

const streamed: Record<string, StreamedCase> = {
  'chunks, then end': { handler: inSteps(write('aa'), write('bb'), end()), before: '2\r\naa\r\n2\r\nbb\r\n' },
  'chunks, then end with a chunk': { handler: inSteps(write('aa'), end('bb')), before: '2\r\naa\r\n2\r\nbb\r\n' },
  'flushHeaders, then end': { handler: inSteps((res) => res.flushHeaders(), end('bb')), before: '2\r\nbb\r\n' },
  'writeHead, then chunks': { handler: inSteps((res) => res.writeHead(201, { 'X-A': '1' }), write('aa'), end()), before: '2\r\naa\r\n' },
  trailers: {
    handler: inSteps(
      (res) => res.set('Trailer', 'X-Sum'),
      write('aa'),
      (res) => res.addTrailers({ 'X-Sum': '1' }),
      end(),
    ),
    before: '2\r\naa\r\n',
  },
  'a pipe': { handler: (_req, res) => Readable.from(['aa', 'bb']).pipe(res), before: '2\r\naa\r\n2\r\nbb\r\n' },
  'a pipeline': { handler: (_req, res) => void pipeline(Readable.from(['aa', 'bb']), res, () => {}), before: '2\r\naa\r\n2\r\nbb\r\n' },
  'Content-Length, in two writes': { handler: inSteps(length(4), write('aa'), write('bb'), end()), before: 'aa' },
  'Content-Length, the last chunk with end': { handler: inSteps(length(4), write('aa'), end('bb')), before: 'aa' },
  'Content-Length, in one write': { handler: inSteps(length(4), write('aabb'), end()), before: undefined },
  'sendFile, in one chunk': { handler: (_req, res) => res.sendFile(SMALL_FILE), before: undefined },
  'Content-Length in writeHead': {
    handler: inSteps((res) => res.writeHead(200, { 'Content-Length': 4 }), write('aa'), end('bb')),
    before: 'aa',
  },
  'Content-Length in a flat array': {
    handler: inSteps((res) => res.writeHead(200, ['content-length', '4']), write('aa'), end('bb')),
    before: 'aa',
  },
  'Content-Length of bytes, not characters': { handler: inSteps(length(4), write('ä'), write('ö'), end()), before: 'Ã¤' },
  'Content-Length and an encoding': {
    handler: inSteps(
      length(2),
      (res) => res.write('ä', 'latin1'),
      (res) => res.write('ö', 'latin1'),
      end(),
    ),
    before: 'ä',
  },
  'Content-Length and a pipe': { handler: (_req, res) => Readable.from(['aa', 'bb']).pipe(res.set('Content-Length', '4')), before: 'aa' },
  'Content-Length that is too long': {
    handler: inSteps(length(5), write('aa'), end('bb')),
    before: 'aabb',
    request: requestFor('GET', 'Connection: close'),
  },
  'Content-Length that is too short': {
    handler: inSteps(length(3), write('aa'), write('bb'), end()),
    before: 'aa',
    request: requestFor('GET', 'Connection: close'),
  },
  'HTTP/1.0': { handler: inSteps(write('aa'), write('bb'), end()), before: 'aabb', request: HTTP_10 },
  'Connection: close without chunks': {
    handler: inSteps((res) => res.removeHeader('Transfer-Encoding'), write('aa'), end('bb')),
    before: 'aabb',
    request: requestFor('GET', 'Connection: close'),
  },
  'one call': { handler: inSteps((res) => res.json({ ok: true })), before: undefined },
  'end without anything': { handler: inSteps(end()), before: undefined },
  'Content-Length: 0': { handler: inSteps(length(0), (res) => res.flushHeaders(), end()), before: undefined },
  HEAD: { handler: inSteps(length(2), write('aa'), end()), before: undefined, request: requestFor('HEAD') },
  'HEAD with flushHeaders': { handler: inSteps((res) => res.flushHeaders(), end()), before: undefined, request: requestFor('HEAD') },
  '204': { handler: inSteps((res) => res.status(204), write('aa'), end()), before: undefined },
  '304': { handler: inSteps((res) => res.status(304).flushHeaders(), end()), before: undefined },
  'writeHead(204)': { handler: inSteps((res) => res.writeHead(204).flushHeaders(), end()), before: undefined },
};
const cases = Object.entries(streamed);

/** Sends the request, and waits for the session's last statement. */
async function untilCommit({ handler, before, request = requestFor('GET') }: StreamedCase, name: string) {
  const ended = deferred<Response>();
  const { port } = await apps.gated(
    async (req, res) => {
      await req.session('entries').insert({ name });
      res.once('close', () => ended.resolve(res));
      return handler(req, res);
    },
    { commitAt: 'end' },
  );
  const hold = apps.hold();
  const client = await RawClient.connect(port);
  client.write(request);
  await hold.reached;
  if (before !== undefined) await client.readUntil((received) => received.includes('\r\n\r\n') && received.endsWith(before));
  return { hold, client, body: client.received.split('\r\n\r\n').slice(1).join('\r\n\r\n'), ended: ended.promise };
}

/** What the same handler sends in a plain app, up to its end. */
async function plainBytes({ handler, request = requestFor('GET') }: StreamedCase): Promise<string> {
  const ended = deferred();
  const { port } = await apps.plain(async (req, res) => {
    await req.session('entries').insert({ name: 'plain' });
    res.once('finish', ended.resolve);
    return handler(req, res);
  });
  const client = await RawClient.connect(port);
  client.write(request);
  await ended.promise;
  await Promise.race([client.closed, client.readUntil((received) => /\r\n\r\n/.test(received))]);
  await client.end();
  return withoutDates(client.received);
}

describe("when the response is committed at its end, with commitAt: 'end'", () => {
  it.each(cases)('lets bytes flow, and withholds what completes it until COMMIT: %s (39, 42)', async (_name, given) => {
    const plain = await plainBytes(given);
    const { hold, client, body, ended } = await untilCommit(given, 'entry');
    if (given.before === undefined) expect(client.received).toBe('');
    else expect(body).toBe(given.before);
    expect(poolUsage(apps.knex).used).toBe(1);
    hold.release();
    await ended;
    await client.end();
    expect(withoutDates(client.received)).toBe(plain);
    expect(await apps.names()).toEqual(['plain', 'entry']);
  });

  it.each(cases.filter(([, { before }]) => before !== undefined))(
    'resets the connection if COMMIT fails after bytes have left: %s (43, 42)',
    async (_name, given) => {
      const { hold, client } = await untilCommit(given, REFUSED);
      const { received } = client;
      hold.release();
      // RST, not FIN: HTTP/1.0 takes a FIN for completion.
      expect(await client.closed).toMatchObject({ code: 'ECONNRESET' });
      expect(client.received).toBe(received);
      expect(apps.reported).toEqual([expect.objectContaining({ code: '23514' })]);
      expect(await apps.names()).toEqual([]);
    },
  );

  it.each(cases.filter(([, { before }]) => before === undefined))(
    'answers with the error if COMMIT fails and nothing has left: %s (19)',
    async (_name, given) => {
      const { hold, client } = await untilCommit(given, REFUSED);
      hold.release();
      await client.readUntil('\r\n\r\n');
      expect(client.received).toMatch(/^HTTP\/1.1 500 /);
      expect(apps.reported).toEqual([]);
      await client.end();
    },
  );

  it.each([
    ['with a length', { 'Content-Length': 4 }, 'aa'],
    ['without', {}, '2\r\naa\r\n2\r\nbb\r\n'],
  ])('withholds what completes it also if its head was written down before the first statement: %s', async (_name, headers, before) => {
    const { port } = await apps.gated(
      async (req, res) => {
        res.writeHead(200, headers);
        await req.session('entries').insert({ name: 'entry' });
        return inSteps(write('aa'), write('bb'), end())(req, res);
      },
      { commitAt: 'end' },
    );
    const hold = apps.hold();
    const client = await RawClient.connect(port);
    client.get('/', 'Connection: close');
    await hold.reached;
    await client.readUntil('aa');
    await eventually(() => expect(client.received.endsWith(`\r\n\r\n${before}`)).toBe(true));
    hold.release();
    await client.closed;
    expect(client.received).toMatch(/aa.*bb/s);
    expect(await apps.names()).toEqual(['entry']);
  });

  it('waits for an awaited write, also for the one that completes the declared length', async () => {
    const { hold, client } = await untilCommit(
      {
        handler: async (_req, res) => {
          res.set('Content-Length', '4');
          await new Promise((resolve) => res.write('aa', resolve));
          await new Promise((resolve) => res.write('bb', resolve));
          res.end();
        },
        before: 'aa',
      },
      'entry',
    );
    hold.release();
    await client.readUntil('aabb');
    await client.end();
  });

  it('passes on the backpressure of the connection (44)', async () => {
    let written = 0;
    const { port } = await apps.gated(
      async (req, res) => {
        await req.session('entries').insert({ name: 'entry' });
        for (; written < 400; written++) if (!res.write(Buffer.alloc(64_000, 'x'))) await once(res, 'drain');
        res.end();
      },
      { commitAt: 'end' },
    );
    const client = await RawClient.connect(port);
    client.pause().get('/', 'Connection: close');
    await eventually(() => expect(written).toBeGreaterThan(0));
    const before = written;
    expect(before).toBeLessThan(400);
    client.resume();
    await client.closed;
    expect(written).toBe(400);
    expect(client.received).toMatch(/0\r\n\r\n$/);
  });

  it('calls the callbacks of write and end once, after COMMIT those of the end', async () => {
    const seen: string[] = [];
    const { hold, client, ended } = await untilCommit(
      {
        handler: async (_req, res) => {
          await new Promise<void>((resolve) => {
            res.write('aa', () => {
              seen.push('write');
              resolve();
            });
          });
          res.on('finish', () => seen.push('finish'));
          res.end('bb', () => seen.push('end'));
        },
        before: 'bb\r\n',
      },
      'entry',
    );
    expect(seen).toEqual(['write']);
    hold.release();
    await ended;
    expect(seen.sort()).toEqual(['end', 'finish', 'write']);
    await client.end();
  });
});
