import { join } from 'node:path';
import { Readable } from 'node:stream';
import type { ErrorRequestHandler, Express } from 'express';
import { type Handler, refusedAfter, useGatedApps } from './support/gated-app';
import { type Answer, RawClient, rawRequest, request } from './support/http';
import { flavours } from './support/ledger';
import { failOnWarnings } from './support/warnings';
import { requestFor, withoutDates } from './support/wire-comparison';

failOnWarnings();

const FILE = join(__dirname, '../LICENSE');

const answers: Record<string, Handler> = {
  json: (_req, res) => res.status(201).cookie('a', 'b').location('/entries/1').json({ ok: true }),
  redirect: (_req, res) => res.redirect('/elsewhere'),
  'sendStatus 204': (_req, res) => res.sendStatus(204),
  sendFile: (_req, res) => res.sendFile(FILE),
  'write and end': (_req, res) => {
    res.set('Content-Encoding', 'br').write('a');
    res.end('b');
  },
  'write with Content-Length': (_req, res) => {
    res.set('Content-Length', '2').write('a');
    res.end('b');
  },
  'writeHead and end': (_req, res) => res.writeHead(201, 'Mine', { 'Content-Length': 1, 'Set-Cookie': 'a=b', 'X-Mine': '1' }).end('a'),
  'writeHead 204': (_req, res) => res.writeHead(204).end(),
  'writeHead with Connection: close': (_req, res) => res.writeHead(200, { Connection: 'close' }).end('a'),
  flushHeaders: (_req, res) => {
    res.flushHeaders();
    res.end('a');
  },
  pipe: (_req, res) => Readable.from(['a'.repeat(1_000_000), 'b'.repeat(1_000_000)]).pipe(res),
  'headers that Node minds': (_req, res) => {
    res.set({ Date: 'today', Connection: 'close', 'Transfer-Encoding': 'chunked', Trailer: 'X-Sum' });
    res.addTrailers({ 'X-Sum': '1' });
    res.sendDate = false;
    res.statusMessage = 'Mine';
    res.end('a');
  },
  'headers taken away': (_req, res) => {
    for (const name of ['X-Powered-By', 'Connection', 'Date', 'Content-Length', 'Transfer-Encoding']) res.removeHeader(name);
    res.end('a');
  },
};

const errorHandlers: Record<string, ErrorRequestHandler[]> = {
  'Express itself': [],
  json: [(_error, _req, res, _next) => res.status(500).json({ error: 'refused' })],
  'write and end': [
    (_error, _req, res, _next) => {
      res.status(500).write('re');
      res.end('fused');
    },
  ],
  'one that is asynchronous': [
    async (_error, _req, res, _next) => {
      for (let i = 0; i < 3; i++) await new Promise((resolve) => setImmediate(resolve));
      res.status(500).end('refused');
    },
  ],
  'a stream': [(_error, _req, res, _next) => Readable.from(['a'.repeat(300_000), 'b'.repeat(300_000)]).pipe(res.status(500))],
  sendFile: [(_error, _req, res, _next) => res.status(500).sendFile(FILE)],
  render: [(_error, _req, res, _next) => res.status(500).render('page', { text: 'refused' })],
  'two, the first of which passes on': [
    async (error, _req, res, next) => {
      await new Promise((resolve) => setImmediate(resolve));
      res.status(503);
      next(error);
    },
    (_error, _req, res, _next) => res.send('refused'),
  ],
};

const combinations = Object.keys(answers).flatMap((answer) => Object.keys(errorHandlers).map((handler) => [answer, handler] as const));

function setUp(app: Express): void {
  // Without the stack in the body.
  app.set('env', 'production');
  app.set('view engine', 'test').set('views', __dirname);
  app.engine('test', (_path, options, callback) => setImmediate(callback, null, `<p>${(options as { text?: string }).text}</p>`));
  app.set(
    'view',
    class {
      render(options: { text: string }, callback: (error: null, html: string) => void) {
        setImmediate(callback, null, `<p>${options.text}</p>`);
      }
      path = 'page';
    },
  );
}

describe.each(flavours)('on $version', (flavour) => {
  const apps = useGatedApps(flavour);

  describe('when COMMIT fails and nothing has been sent', () => {
    // Express logs the errors that it answers, unless its `env` is 'test'.
    beforeAll(() => {
      jest.spyOn(console, 'error').mockImplementation(() => {});
    });
    afterAll(() => jest.restoreAllMocks());

    // In the plain app the statement commits by itself, and fails at once: its handler has touched nothing yet.
    it.each(combinations)(
      'sends the error byte for byte as if the handler had thrown at once: %s, answered by %s (19, hazard 27)',
      async (answer, handler) => {
        const ask = async (kind: 'plain' | 'gated') => {
          const { port } = await apps[kind](refusedAfter(answers[answer] as Handler), {
            before: setUp,
            errorHandlers: errorHandlers[handler] ?? [],
          });
          return withoutDates(await rawRequest(port, requestFor('GET', 'Connection: close')));
        };
        const plain = await ask('plain');
        expect(plain).toMatch(/^HTTP\/1.1 50[03] /);
        expect((await ask('gated')).replace(/^x-powered-by/m, 'X-Powered-By')).toBe(plain);
      },
    );

    it('has the Date header again that the handler had taken away', async () => {
      const { url } = await apps.gated(
        refusedAfter((_req, res) => {
          res.removeHeader('Date');
          res.end();
        }),
      );
      expect((await request(url)).headers).toHaveProperty('date');
    });

    it('answers a HEAD request without a body', async () => {
      const { port } = await apps.gated(refusedAfter((_req, res) => res.json({ ok: true })));
      const client = await RawClient.connect(port);
      client.write(`HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n${requestFor('HEAD', 'Connection: close')}`);
      await client.closed;
      expect(client.received.match(/HTTP\/1.1 500 Internal Server Error\r\n/g)).toHaveLength(2);
      expect(client.received).toMatch(/\r\n\r\n$/);
    });

    it('answers an HTTP/1.0 request', async () => {
      const { port } = await apps.gated(refusedAfter((_req, res) => res.json({ ok: true })));
      expect(await rawRequest(port, 'GET / HTTP/1.0\r\n\r\n')).toMatch(/^HTTP\/1.1 500 Internal Server Error\r\n.*Connection: close\r\n/s);
    });
  });

  describe('when COMMIT fails after the handler has set headers', () => {
    const DISCARDED = {
      'Content-Type': 'text/csv',
      'Content-Language': 'de',
      'Content-Disposition': 'attachment; filename="a.csv"',
      'Content-Encoding': 'identity',
      'Content-Range': 'bytes 0-1/2',
      'Content-Location': '/a.csv',
      'Content-MD5': 'abc',
      ETag: '"a"',
      'Last-Modified': new Date(0).toUTCString(),
      'Cache-Control': 'public, max-age=1000',
      Expires: new Date(1e13).toUTCString(),
      Location: '/a',
    };
    const KEPT = {
      'Content-Security-Policy': "default-src 'self'",
      'Content-Security-Policy-Report-Only': "default-src 'self'",
      'Strict-Transport-Security': 'max-age=1',
      Vary: 'Origin',
      'Access-Control-Allow-Origin': '*',
      'X-Request-Id': '1',
    };
    const cookies = (answer: Answer) => answer.headers['set-cookie'];
    const discard = (answer: Answer) =>
      Object.keys(DISCARDED).filter((name) => answer.headers[name.toLowerCase()] === DISCARDED[name as 'ETag']);

    it('takes back all that the handler has set since its first statement', async () => {
      const { url } = await apps.gated(refusedAfter((_req, res) => res.set(DISCARDED).set(KEPT).cookie('a', 'b').send('a')));
      const answer = await request(url);
      expect(answer).toMatchObject({ status: 500, complete: true });
      expect(discard(answer)).toEqual([]);
      for (const name of Object.keys(KEPT).slice(2)) expect(answer.headers).not.toHaveProperty(name.toLowerCase());
      expect(cookies(answer)).toBeUndefined();
    });

    it('takes back what promises a success even if it was set between the middleware and the first statement, and keeps the rest', async () => {
      const { url } = await apps.gated(
        refusedAfter((_req, res) => res.end()),
        {
          after: (app) => app.use((_req, res, next) => next(void res.set(DISCARDED).set(KEPT).cookie('a', 'b'))),
          errorHandlers: [(_error, _req, res, _next) => res.end('refused')],
        },
      );
      const answer = await request(url);
      expect(discard(answer)).toEqual([]);
      expect(cookies(answer)).toBeUndefined();
      for (const [name, value] of Object.entries(KEPT)) expect(answer.headers).toHaveProperty([name.toLowerCase()], value);
    });

    it('keeps what was there when the middleware ran, but for what speaks of the representation', async () => {
      const { url } = await apps.gated(
        refusedAfter((_req, res) => {
          res.cookie('late', '1').set({ 'Cache-Control': 'public', Vary: 'Cookie', 'X-Request-Id': '2', Location: '/b' });
          res.append('X-List', 'b');
          res.removeHeader('Access-Control-Allow-Origin');
          res.end();
        }),
        {
          before: (app) => app.use((_req, res, next) => next(void res.set(DISCARDED).set(KEPT).set('X-List', 'a').cookie('early', '1'))),
          errorHandlers: [(_error, _req, res, _next) => res.end('refused')],
        },
      );
      const answer = await request(url);
      expect(answer).toMatchObject({ status: 500, body: 'refused', complete: true });
      expect(cookies(answer)).toEqual(['early=1; Path=/']);
      expect(discard(answer).sort()).toEqual(['Cache-Control', 'ETag', 'Expires', 'Last-Modified', 'Location']);
      for (const [name, value] of Object.entries(KEPT)) expect(answer.headers).toHaveProperty([name.toLowerCase()], value);
      expect(answer.headers['x-list']).toBe('a');
    });

    it('does not give a cookie away that was added to an early one', async () => {
      const { url } = await apps.gated(
        refusedAfter((_req, res) => res.cookie('third', '1').end()),
        {
          before: (app) => app.use((_req, res, next) => next(void res.cookie('first', '1').cookie('second', '1'))),
          after: (app) => app.use((_req, res, next) => next(void res.append('Set-Cookie', 'between=1'))),
        },
      );
      expect(cookies(await request(url))).toEqual(['first=1; Path=/', 'second=1; Path=/']);
    });
  });
});
