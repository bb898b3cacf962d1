import { once } from 'node:events';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import compression from 'compression';
import type { ErrorRequestHandler, RequestHandler, Response } from 'express';
import { getDecoded, openDecoded } from './support/decoded-request';
import { type AppOptions, type Handler, REFUSED, useGatedApps } from './support/gated-app';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

const apps = useGatedApps();

const LARGE = 'x'.repeat(1_000_000);
const FILE = join(__dirname, '../package-lock.json');

const firstStatement: RequestHandler = async (req, _res, next) => {
  await req.session('entries').insert({ name: 'first' });
  next();
};

/** Inside the gate only if it is mounted after the first statement. */
const positions: Record<string, AppOptions> = {
  'before the session': { before: (app) => app.use(compression({ threshold: 0 })) },
  'after the session': { after: (app) => app.use(compression({ threshold: 0 })) },
  'after the first statement': { after: (app) => app.use(firstStatement, compression({ threshold: 0 })) },
};

const answers: Record<string, (res: Response) => unknown> = {
  json: (res) => res.status(201).json({ ok: true }),
  'a large text': (res) => res.send(LARGE),
  nothing: (res) => res.status(204).end(),
  'a redirect': (res) => res.redirect('/elsewhere'),
  'an error status': (res) => res.status(409).json({ ok: false }),
  sendFile: (res) => res.sendFile(FILE),
  'write and end': (res) => {
    res.type('text').write('a');
    res.end('b');
  },
  'writeHead and end': (res) => res.writeHead(200, { 'Content-Type': 'text/plain' }).end('ab'),
  'end with a callback': (res) => res.type('text').end('ab', () => {}),
  flushHeaders: (res) => {
    res.type('text').flushHeaders();
    res.end('ab');
  },
  'a pipe': (res) => Readable.from([LARGE, LARGE, 'end']).pipe(res.type('text')),
  'a pipeline of a generator': (res) =>
    pipeline(async function* () {
      yield 'small';
      yield* [LARGE, LARGE, 'end'];
    }, res.type('text')),
  'writes that wait for drain': async (res) => {
    res.type('text');
    for (let i = 0; i < 5; i++) if (!res.write(LARGE)) await once(res, 'drain');
    res.end();
  },
  'a drain listener from before the first write': (res) => {
    const left = [LARGE, LARGE, 'c', LARGE, 'e'];
    const writeOn = () => {
      while (left.length > 0) if (!res.write(left.shift())) return;
      if (!res.writableEnded) res.end();
    };
    res.type('text').on('drain', writeOn);
    writeOn();
  },
  'what is not compressible': (res) => res.type('png').send(Buffer.from(LARGE)),
};

const table = Object.keys(positions).flatMap((position) => Object.keys(answers).map((answer) => [position, answer] as const));

const answering =
  (name: string, answer: (res: Response) => unknown): Handler =>
  async (req, res) => {
    await req.session('entries').insert({ name });
    return answer(res);
  };

describe('when compression is mounted too', () => {
  it.each(table)('sends nothing before COMMIT, and then what it sends in a plain app: %s, %s (72, hazard 24)', async (position, answer) => {
    const options = positions[position] as AppOptions;
    const handler = answering('entry', answers[answer] as (res: Response) => unknown);
    const plain = await getDecoded((await apps.plain(handler, options)).url);
    const { url, sockets } = await apps.gated(handler, options);
    const hold = apps.hold(answer === 'an error status' ? 'ROLLBACK' : 'COMMIT');
    const answered = getDecoded(url);
    await hold.reached;
    expect(sockets[0]?.bytesWritten).toBe(0);
    hold.release();
    expect(await answered).toEqual(plain);
    expect(plain).toMatchObject({ complete: true });
  });

  const errorHandlers: Record<string, ErrorRequestHandler> = {
    json: (_error, _req, res, _next) => res.status(500).json({ error: 'refused' }),
    'write and end': (_error, _req, res, _next) => {
      res.status(500).type('text').write('re');
      res.end('fused');
    },
    'a large stream': (_error, _req, res, _next) => Readable.from([LARGE, LARGE, 'end']).pipe(res.status(500).type('text')),
    sendFile: (_error, _req, res, _next) => res.status(500).sendFile(FILE),
    'writes that wait for drain': async (_error, _req, res, _next) => {
      res.status(500).type('text');
      for (let i = 0; i < 5; i++) if (!res.write(LARGE)) await once(res, 'drain');
      res.end();
    },
  };
  const failing = ['json', 'a large text', 'write and end', 'flushHeaders', 'sendFile', 'a pipe', 'writes that wait for drain'];
  const failures = Object.keys(positions).flatMap((position) =>
    failing.flatMap((answer) => Object.keys(errorHandlers).map((handler) => [position, answer, handler] as const)),
  );

  it.each(failures)(
    'sends the error response whole if COMMIT fails: %s, %s, answered by %s (hazard 36)',
    async (position, answer, name) => {
      const errorHandler = errorHandlers[name] as ErrorRequestHandler;
      const { url } = await apps.gated(answering(REFUSED, answers[answer] as (res: Response) => unknown), {
        ...positions[position],
        errorHandlers: [errorHandler],
      });
      const plain = await apps.plain(
        answering(REFUSED, () => {}),
        { errorHandlers: [errorHandler] },
      );
      const [expected, answered] = [await getDecoded(plain.url), await getDecoded(url)];
      expect(answered).toMatchObject({ status: 500, complete: true });
      expect(answered.body === expected.body).toBe(true);
      expect(await apps.names()).not.toContain(REFUSED);
    },
  );
});

describe('when events are streamed through compression', () => {
  it.each(Object.keys(positions))(
    'shows each event as soon as it was flushed, also one flushed before COMMIT: %s (hazard 36)',
    async (position) => {
      let response: Response | undefined;
      const { url } = await apps.gated(
        answering('entry', (res) => {
          response = res;
          res.type('text/event-stream').write('data: 1\n\n');
          (res as unknown as { flush(): void }).flush();
        }),
        positions[position],
      );
      const opened = await openDecoded(url);
      await eventually(() => expect(opened.text()).toBe('data: 1\n\n'));
      expect(poolUsage(apps.knex).used).toBe(0);
      response?.write('data: 2\n\n');
      (response as unknown as { flush(): void }).flush();
      await eventually(() => expect(opened.text()).toBe('data: 1\n\ndata: 2\n\n'));
      response?.end();
      await opened.closed;
      expect(opened.message.complete).toBe(true);
    },
  );
});

describe("when compression is mounted too, with commitAt: 'end'", () => {
  it.each(Object.keys(positions))('withholds the end until COMMIT, and breaks off if it fails: %s', async (position) => {
    for (const name of ['entry', REFUSED]) {
      const { url } = await apps.gated(
        answering(name, async (res) => {
          res.type('text').write('a');
          (res as unknown as { flush(): void }).flush();
          await new Promise((resolve) => setImmediate(resolve));
          res.end('b');
        }),
        { ...positions[position], commitAt: 'end' },
      );
      const answered = await getDecoded(url);
      if (name === 'entry') expect(answered).toMatchObject({ status: 200, body: 'ab', complete: true });
      else expect(answered).toMatchObject({ complete: false });
    }
    expect(await apps.names()).not.toContain(REFUSED);
  });
});
