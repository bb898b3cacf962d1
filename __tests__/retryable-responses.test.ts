import { join } from 'node:path';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import compression from 'compression';
import express, { type Request, type RequestHandler, type Response, Router } from 'express';
import { retryable, type Session, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import { expressSession } from './support/express-session';
import { get, keepAliveAgent, post, RawClient } from './support/http';
import { express5Flavour, flavours, insert, useLedger } from './support/ledger';
import { retrying, transient, type Work } from './support/retrying';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

const serve = retrying(ledger);
const FILE = join(__dirname, '../package.json');

/** What comes over one connection that goes on: less the date, in no order. */
async function onOneConnection(port: number, method: string, headers: string[]): Promise<string[]> {
  const client = await RawClient.connect(port);
  client.write([`${method} / HTTP/1.1`, 'Host: localhost', ...headers, '', ''].join('\r\n'));
  await client.readUntil('\r\n\r\n');
  client.get('/after', 'Connection: close');
  await client.closed;
  return client.received
    .split('\r\n')
    .filter((line) => !/^date: ./i.test(line))
    .map((line) => line.replace(/^[\w-]+:/, (name) => name.toLowerCase()))
    .sort();
}

const after = Router().get('/after', (_req, res) => void res.send('after'));

const headersFromBefore: RequestHandler = (_req, res, next) => {
  res.setHeader('X-Before', 'yes');
  res.setHeader('Link', ['</before>; rel=a', '</before>; rel=b']);
  res.setHeader('Set-Cookie', ['before=1', 'before=2']);
  res.vary('Origin').set('Cache-Control', 'private').status(202);
  res.statusMessage = 'Before';
  next();
};

let stored = 0;
const last: Work = async (req, res) => {
  await insert(req, `last ${++stored}`);
  res.cookie('last', '1').vary('Accept').json({ attempt: 'last' });
};

const prepared: Record<string, (res: Response, req: Request) => unknown> = {
  headers: (res) => res.set({ 'X-First': '1', ETag: '"first"', Expires: '0' }).location('/first').type('text/csv').vary('X-First'),
  cookies: (res) => res.cookie('first', '1').clearCookie('last'),
  'a status and its message': (res) => Object.assign(res.status(207), { statusMessage: 'First' }),
  'other values for headers from before': (res) => res.set({ 'X-Before': 'no', 'Cache-Control': 'public', Link: '</first>' }),
  'more values for headers from before': (res) =>
    res.append('X-Before', 'first').append('Link', '</first>').append('Vary', 'X-First').append('Set-Cookie', 'first=1'),
  "more values, by Node's own means": (res) => res.appendHeader('Link', '</first>').appendHeader('Set-Cookie', 'first=1'),
  'no headers from before': (res) => {
    for (const name of ['X-Before', 'Vary', 'Set-Cookie', 'X-Powered-By', 'Date', 'Connection', 'Transfer-Encoding', 'Content-Length'])
      res.removeHeader(name);
  },
  'a head': (res) => res.writeHead(201, 'First', { 'X-First': '1', 'Content-Length': 5 }),
  'Connection: close': (res) => res.set('Connection', 'close'),
  trailers: (res) => res.set('Trailer', 'X-First').addTrailers({ 'X-First': '1' }),
  json: (res) => res.status(201).json({ attempt: 'first' }),
  'a text of a known length': (res) => res.set('X-First', '1').send('first'),
  'a redirect': (res) => res.redirect('/first'),
  'no content': (res) => res.sendStatus(204),
  'a first byte': (res) => res.type('text').write('f'),
  'a head that was flushed': (res) => res.set('X-First', '1').flushHeaders(),
  'a head and bytes that were corked': (res) => {
    res.cork();
    res.writeHead(201, { 'Content-Length': 5 });
    res.write('f');
  },
  'Connection: close, and its end': (res) => res.set('Connection', 'close').end('first'),
  sendFile: (res) => res.sendFile(FILE),
  'a download': (res) => res.download(FILE),
  'a pipe': (res) => Readable.from(['f', 'x'.repeat(100_000), 'irst']).pipe(res),
};

describe.each(flavours)('on $version', (flavour) => {
  describe('when the first attempt has prepared a response', () => {
    const requests: [method: string, headers: string[]][] = [['GET', []]];
    // Node's part in it is the same on both.
    if (flavour === express5Flavour) requests.push(['HEAD', []], ['GET', ['If-None-Match: *']]);
    it.each(Object.keys(prepared))('sends what the last one would have sent alone, and the connection goes on: %s', async (name) => {
      for (const [method, headers] of requests) {
        const answerAfter = async (first?: Work) => {
          let isFirst = first !== undefined;
          const site = await serve(
            async (req, res, next) => {
              if (!isFirst) {
                await last(req, res, next, 2);
                return;
              }
              isFirst = false;
              await insert(req, 'first', 'conflict');
              await first?.(req, res, next, 1);
              // What is held fails at COMMIT.
              if (!res.headersSent || name === 'a head') throw transient();
            },
            { flavour, before: [after, headersFromBefore] },
          );
          const received = await onOneConnection(site.port, method, headers);
          expect(site.ran()).toBe(first ? 2 : 1);
          return received;
        };
        const expected = await answerAfter();
        expect(expected).toContain(headers.length > 0 ? 'HTTP/1.1 304 Before' : 'HTTP/1.1 202 Before');
        expect(await answerAfter((req, res) => prepared[name]?.(res, req))).toEqual(expected);
      }
      expect((await ledger.stored()).filter((id) => id.startsWith('last'))).toHaveLength(2 * requests.length);
      expect(await ledger.stored()).not.toContain('first');
    });
  });

  it.each(['pipe', 'pipeline'])('streams the response of the last attempt, after a stream of the first: %s', async (how) => {
    const site = await serve(
      async (req, res, _next, attempt) => {
        await insert(req, `stored by ${attempt}`, attempt === 1 ? 'conflict' : undefined);
        const source = Readable.from([`${attempt}`, 'x'.repeat(300_000), `${attempt}`]);
        if (how === 'pipeline') await pipeline(source, res);
        else source.pipe(res);
      },
      { flavour },
    );
    const answer = await site.get();
    expect(answer).toMatchObject({ status: 200, complete: true, body: `2${'x'.repeat(300_000)}2` });
    expect(await ledger.stored()).toEqual(['stored by 2']);
  });

  const early: RequestHandler = (req, res, next) => {
    Object.assign(req, { early: 'early' });
    // Read-only, and for good: what a proxy must not replace.
    Object.defineProperty(res, 'helper', { value: () => 'helped' });
    next();
  };

  it('gives the last attempt the same body, and nothing that the first has put on the request', async () => {
    const seen: unknown[] = [];
    const bodies = new Set<unknown>();
    const site = await serve(
      async (req, res, _next, attempt) => {
        const own = req as Request & { user?: number; early?: string };
        seen.push(own.user, own.early);
        bodies.add(req.body);
        Object.assign(req, { user: attempt, early: 'late' });
        await insert(req, `stored by ${attempt}`, attempt === 1 ? 'conflict' : undefined);
        res.app.set('attempt', attempt);
        expect((res as Response & { helper(): string }).helper()).toBe('helped');
        res.json({ sent: req.body, method: req.method, ip: req.ip !== undefined, accepts: req.accepts('json') });
      },
      { flavour, before: [early] },
    );
    const answer = await post(site.url, { some: 'body' });
    expect(JSON.parse(answer.body)).toEqual({ sent: { some: 'body' }, method: 'POST', ip: true, accepts: 'json' });
    expect(seen).toEqual([undefined, 'early', undefined, 'early']);
    expect(bodies.size).toBe(1);
  });
});

describe('when other middleware stands before the session', () => {
  it('sends one compressed response, of the last attempt', async () => {
    const app = express().use(compression({ threshold: 0 }), sessionMiddleware(ledger.knex));
    let attempt = 0;
    const answer: RequestHandler = retryable(async (req, res) => {
      await insert(req, `stored by ${++attempt}`, attempt === 1 ? 'conflict' : undefined);
      res.type('text').write(`attempt ${attempt}`);
      res.end();
    });
    const { url } = await ledger.listen(app.use(answer, sessionErrorHandler()));
    const response = await fetch(url);
    expect([response.status, response.headers.get('content-encoding')]).toEqual([200, 'gzip']);
    expect(await response.text()).toBe('attempt 2');
    expect(await ledger.stored()).toEqual(['stored by 2']);
  });

  it('saves a login session once, with the cookie', async () => {
    const login = expressSession({ secret: 'secret', resave: false, saveUninitialized: false });
    const app = express().use(login, sessionMiddleware(ledger.knex, { property: 'db' }));
    let attempt = 0;
    const answer: RequestHandler = retryable(async (req, res) => {
      const { db, session } = req as unknown as { db: Session; session: { user?: number } };
      session.user = ++attempt;
      await db('notes').insert({ id: `stored by ${attempt}`, at_commit: attempt === 1 ? 'conflict' : null });
      res.json({ attempt });
    });
    const me: RequestHandler = (req, res) => void res.json((req as unknown as { session: { user: number } }).session.user);
    const { url } = await ledger.listen(app.get('/me', me).use(answer, sessionErrorHandler()));
    const agent = keepAliveAgent();
    const first = await get(url, { agent });
    expect(first).toMatchObject({ status: 200, body: '{"attempt":2}' });
    const cookies = first.headers['set-cookie'] ?? [];
    expect(cookies).toHaveLength(1);
    expect(await get(`${url}/me`, { agent, headers: { cookie: String(cookies[0]).split(';')[0] } })).toMatchObject({ body: '2' });
    agent.destroy();
  });
});
