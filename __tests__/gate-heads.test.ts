import { REFUSED, useGatedApps } from './support/gated-app';
import { RawClient, request } from './support/http';
import { failOnWarnings } from './support/warnings';
import {
  attempt,
  type Cases,
  expectSameAsPlain,
  inserting,
  listed,
  type ObservedHandler,
  requestFor,
  stateOf,
} from './support/wire-comparison';

failOnWarnings();

const apps = useGatedApps();

/** Writes a head, says what came of it, and goes on. */
const head =
  (...args: unknown[]): ObservedHandler =>
  (_req, res, note) => {
    note(attempt(() => (res.writeHead as (...args: unknown[]) => unknown)(...args)));
    note(stateOf(res));
    res.end('abc');
  };

const heads: Cases = {
  'a status': head(201),
  'a status in text': head('203'),
  'headers as an object': head(201, { 'X-A': '1', 'Set-Cookie': ['a=b', 'c=d'], 'Content-Type': 'text/html' }),
  'headers as a flat array': head(201, ['X-A', '1', 'X-B', '2']),
  'headers as pairs, which Node refuses where setHeader was used': head(201, [['X-A', '1']]),
  'a reason phrase': head(299, 'Fine by me'),
  'a reason phrase and headers': head(299, 'Fine by me', { 'X-A': '1' }),
  'a reason phrase and a flat array': head(299, 'Fine by me', ['X-A', '1']),
  'undefined and headers': head(201, undefined, { 'X-A': '1' }),
  'a Content-Length': head(200, { 'Content-Length': 3 }),
  'a Content-Length that is too short': [
    head(200, { 'Content-Length': 2 }),
    { isLast: true, request: requestFor('GET', 'Connection: close') },
  ],
  'Connection: close': [head(200, { Connection: 'close' }), { isLast: true }],
  'no headers, after setHeader': (_req, res) => res.setHeader('X-A', '1').writeHead(200).end('abc'),
  'headers over those of setHeader': (_req, res) => res.setHeader('X-A', '1').writeHead(200, { 'x-a': '2' }).end('abc'),
  'a second head': (_req, res, note) => {
    res.writeHead(201, { 'X-A': '1' });
    note(attempt(() => res.writeHead(202)));
    note(attempt(() => res.setHeader('X-B', '1')));
    note(attempt(() => res.appendHeader('X-A', '2')));
    note(attempt(() => res.removeHeader('X-Powered-By')));
    note(attempt(() => res.cookie('a', 'b')));
    res.end('abc');
  },
  'a head, then write': (_req, res) => {
    res.writeHead(201, { 'X-A': '1' });
    res.write('a');
    res.end('b');
  },
  'a head, then flushHeaders': (_req, res) => {
    res.writeHead(201, { 'X-A': '1' });
    res.flushHeaders();
    res.end('b');
  },
};

const refused: [string, unknown[]][] = [
  ['status 99', [99]],
  ['status 1000', [1000]],
  ['a status that is no number', ['abc']],
  ['no status', []],
  ['a header name with a blank', [200, { 'a b': '1' }]],
  ['a header value with a line break', [200, { a: 'b\r\nc: d' }]],
  ['an undefined header value', [200, { a: undefined }]],
  ['a flat array of odd length', [200, ['a']]],
  ['a reason phrase with a line break', [200, 'a\r\nb: c']],
];

describe('when a handler calls writeHead', () => {
  it.each(listed(heads))('sends nothing before COMMIT, and then what plain Express sends: %s', async (_name, handler, options) => {
    await expectSameAsPlain(apps, inserting(handler), options);
  });

  it.each(refused)('throws what Node throws, at once: %s', async (_name, args) => {
    await expectSameAsPlain(
      apps,
      inserting((_req, res, note) => {
        note(attempt(() => (res.writeHead as (...args: unknown[]) => unknown)(...args)));
        note(stateOf(res));
        res.statusMessage = 'OK';
        res.end('abc');
      }),
    );
  });

  it.each([
    { head: 201, later: 404, endsWith: 'COMMIT' as const },
    { head: 404, later: 201, endsWith: 'ROLLBACK' as const },
  ])('decides by the status of the head that is sent: $head, then statusCode = $later', async ({ head, later, endsWith }) => {
    await expectSameAsPlain(
      apps,
      inserting((_req, res, note) => {
        res.writeHead(head);
        res.statusCode = later;
        note(stateOf(res));
        res.end('abc');
      }),
      { endsWith },
    );
    expect(await apps.names()).toEqual(endsWith === 'COMMIT' ? ['entry', 'entry'] : ['entry']);
  });
});

describe('when a handler calls writeHead before its first statement', () => {
  const early = (status: number, headers: Record<string, string | number>): ObservedHandler => {
    return async (req, res, note) => {
      res.writeHead(status, headers);
      await req.session('entries').insert({ name: 'entry' });
      note(stateOf(res));
      note(attempt(() => res.setHeader('X-B', '1')));
      res.end('abc');
    };
  };
  it.each(
    listed({ 'with headers': early(201, { 'X-A': '1' }), 'with a length': early(200, { 'Content-Length': 3 }), '204': early(204, {}) }),
  )('sends nothing before COMMIT, and then what plain Express sends: %s', async (_name, handler) => {
    await expectSameAsPlain(apps, handler);
  });

  it.each<[string, [status: number, reasonOrHeaders?: any]]>([
    ['204', [204, {}]],
    ['304', [304, {}]],
    ['a shorter Content-Length', [200, { 'Content-Length': 3 }]],
    ['Connection: close', [200, { Connection: 'close' }]],
    ['a reason phrase', [200, 'Fine by me']],
  ])('keeps nothing of it in the error response when COMMIT fails: %s', async (_name, args) => {
    const { url } = await apps.gated(
      async (req, res) => {
        res.writeHead(...args);
        await req.session('entries').insert({ name: REFUSED });
        res.end();
      },
      {
        errorHandlers: [
          (_error, _req, res, _next) => {
            // No Content-Length: Node has to find out by itself how long the body is.
            res.write('It was ');
            res.end('refused.');
          },
        ],
      },
    );
    const answer = await request(url);
    expect(answer).toMatchObject({ status: 500, body: 'It was refused.', complete: true });
    expect(answer.headers).toMatchObject({ 'transfer-encoding': 'chunked' });
    expect(answer.headers).not.toHaveProperty('content-length');
    expect(await apps.names()).toEqual([]);
  });
});

describe('when a handler sends interim responses', () => {
  const interim = 'HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n';
  const sendInterim: ObservedHandler = (_req, res) => {
    res.writeProcessing();
    res.writeEarlyHints({ link: '</a.css>; rel=preload' });
  };

  it('lets them pass before COMMIT, and holds the response', async () => {
    await expectSameAsPlain(
      apps,
      inserting((req, res, note, next) => {
        sendInterim(req, res, note, next);
        res.json({ ok: true });
      }),
      { beforeCommit: interim },
    );
  });

  it('lets 100 Continue pass before the first statement and after it', async () => {
    const { server, port } = await apps.gated(async (req, res) => {
      await req.session('entries').insert({ name: 'entry' });
      if (req.headers.expect) res.writeContinue();
      let body = '';
      for await (const chunk of req) body += chunk;
      res.json({ body });
    });
    server.on('checkContinue', (req, res) => server.emit('request', req, res));
    const hold = apps.hold();
    const client = await RawClient.connect(port);
    client.write('POST / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 5\r\nConnection: close\r\n\r\n');
    await client.readUntil('HTTP/1.1 100 Continue\r\n\r\n');
    client.write('hello');
    await hold.reached;
    expect(client.received).toBe('HTTP/1.1 100 Continue\r\n\r\n');
    hold.release();
    await client.closed;
    expect(client.received).toMatch(/^HTTP\/1.1 100 Continue\r\n\r\nHTTP\/1.1 200 OK\r\n.*\{"body":"hello"\}$/s);
  });
});
