import { createRequire } from 'node:module';
import type { Express, Request, RequestHandler, Response } from 'express';
import { type AppOptions, type Handler, REFUSED, useGatedApps } from './support/gated-app';
import { get } from './support/http';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

// They come with express and compression, and have no types.
const load = createRequire(__filename);
const onFinished = load('on-finished') as (res: Response, listener: (error: Error | null, res: Response) => void) => void;
const onHeaders = load('on-headers') as (res: Response, listener: (this: Response) => void) => void;

const apps = useGatedApps();

const firstStatement: RequestHandler = async (req, _res, next) => {
  await req.session('entries').insert({ name: 'first' });
  next();
};

type Mount = (middleware: RequestHandler) => AppOptions;

/** Where another middleware may stand; only the last is inside the gate. */
const positions: Record<string, Mount> = {
  'before the session': (middleware) => ({ before: (app: Express) => app.use(middleware) }),
  'after the session': (middleware) => ({ after: (app: Express) => app.use(middleware) }),
  'after the first statement': (middleware) => ({ after: (app: Express) => app.use(firstStatement, middleware) }),
};

const answers: Record<string, (res: Response) => unknown> = {
  json: (res) => res.status(201).json({ ok: true }),
  'write and end': (res) => {
    res.write('a');
    res.end('b');
  },
  'writeHead and end': (res) => res.writeHead(202, { 'X-Mine': '1' }).end('ab'),
  'an error status': (res) => res.status(409).json({ ok: false }),
  'COMMIT that fails': (res) => res.status(201).json({ ok: true }),
};
const table = Object.keys(positions).flatMap((position) => Object.keys(answers).map((answer) => [position, answer] as const));

const handlerFor =
  (answer: string): Handler =>
  async (req, res) => {
    await req.session('entries').insert({ name: answer === 'COMMIT that fails' ? REFUSED : 'entry' });
    return answers[answer]?.(res);
  };

const sayRefused = {
  errorHandlers: [((_error, _req, res, _next) => res.status(500).json({ error: 'refused' })) as import('express').ErrorRequestHandler],
};

/** The answers of a plain app and of a gated one, and what the middleware saw. */
async function compare(position: string, answer: string, make: (note: (value: unknown) => void) => RequestHandler) {
  const run = async (kind: 'plain' | 'gated') => {
    const seen: unknown[] = [];
    const mounts = positions[position]?.(make((value) => seen.push(value)));
    const { url } = await apps[kind](handlerFor(answer), { ...mounts, ...sayRefused });
    const { status, headers, body, complete } = await get(url);
    const { date: _, ...others } = headers;
    return { status, headers: others, body, complete, seen };
  };
  return { plain: await run('plain'), gated: await run('gated') };
}

describe.each(table)('when another middleware stands %s, and the response is %s', (position, answer) => {
  const lostAtFailure = answer === 'COMMIT that fails' && position === 'after the first statement';

  it('logs what the client received: as morgan does, by on-finished (72)', async () => {
    const { plain, gated } = await compare(position, answer, (note) => (req, res, next) => {
      onFinished(res, (error, { statusCode }) => note([req.method, statusCode, res.getHeader('content-length'), error]));
      next();
    });
    expect(gated).toEqual(plain);
    expect(gated.seen).toHaveLength(1);
  });

  it('calls a listener for the head once, and takes the header that it sets: as express-session and response-time do, by on-headers (72)', async () => {
    const { plain, gated } = await compare(position, answer, (note) => (_req, res, next) => {
      onHeaders(res, function () {
        note(this.statusCode);
        this.setHeader('X-Listener', String(this.statusCode));
      });
      next();
    });
    if (lostAtFailure) {
      expect(gated).toMatchObject({ status: 500, body: plain.body, complete: true });
      expect(gated.seen.length).toBeLessThanOrEqual(1);
    } else expect(gated).toEqual(plain);
  });

  it('goes through a wrapper of write and end that changes the body (72)', async () => {
    const { plain, gated } = await compare(position, answer, (note) => (_req, res, next) => {
      const { write, end } = res;
      const shout = (chunk: unknown) => (typeof chunk === 'string' || Buffer.isBuffer(chunk) ? String(chunk).toUpperCase() : chunk);
      res.write = ((chunk: unknown, ...rest: unknown[]) => {
        note('write');
        return (write as (...args: unknown[]) => boolean).call(res, shout(chunk), ...rest);
      }) as typeof write;
      res.end = ((chunk: unknown, ...rest: unknown[]) => {
        note('end');
        return (end as (...args: unknown[]) => Response).call(res, shout(chunk), ...rest);
      }) as typeof end;
      next();
    });
    // Taken off with the response that was discarded: it might remember that one's end.
    if (lostAtFailure) expect(gated).toMatchObject({ status: 500, body: '{"error":"refused"}', complete: true });
    else expect(gated).toEqual(plain);
  });

  it('waits for a wrapper of end that does something slow first (72)', async () => {
    const { plain, gated } = await compare(position, answer, (note) => (_req, res, next) => {
      const { end } = res;
      let hasEnded = false;
      res.end = ((...args: unknown[]) => {
        if (hasEnded) return false;
        hasEnded = true;
        setImmediate(() => {
          note('end');
          (end as (...args: unknown[]) => Response).apply(res, args);
        });
        return res;
      }) as typeof end;
      next();
    });
    const { seen: _, ...expected } = plain;
    expect(gated).toMatchObject(expected);
  });

  it('keeps headers as helmet sets them (72)', async () => {
    const helmet = {
      'Content-Security-Policy': "default-src 'self'",
      'X-Content-Type-Options': 'nosniff',
      'Strict-Transport-Security': 'max-age=1',
    };
    const { plain, gated } = await compare(position, answer, () => (_req, res, next) => {
      res.set(helmet).removeHeader('X-Powered-By');
      next();
    });
    if (lostAtFailure) expect(gated).toMatchObject({ status: 500, body: plain.body, complete: true });
    else expect(gated).toEqual(plain);
  });
});

describe('when a listener for the head throws', () => {
  // In a plain app the handler gets that error from res.json(). Here COMMIT came first: it is too late for another answer.
  it('does not look like a success, and tells onError', async () => {
    const { url } = await apps.gated(handlerFor('json'), {
      before: (app) =>
        app.use((_req, res, next) => {
          onHeaders(res, () => {
            throw new Error('no head');
          });
          next();
        }),
    });
    const answer = await get(url);
    expect(answer.status === 0 || answer.status >= 500).toBe(true);
    expect(apps.reported).toEqual([expect.objectContaining({ message: 'no head' })]);
  });
});

describe('when a middleware watches a request whose client disconnects', () => {
  it('tells on-finished, as in a plain app', async () => {
    const seen: string[] = [];
    const watch: RequestHandler = (_req, res, next) => {
      onFinished(res, (_error, { writableFinished }) => seen.push(String(writableFinished)));
      next();
    };
    for (const kind of ['plain', 'gated'] as const) {
      const controller = new AbortController();
      const { url } = await apps[kind](
        async (req: Request, res: Response) => {
          await req.session('entries').insert({ name: 'entry' });
          const closed = new Promise((resolve) => res.once('close', resolve));
          controller.abort();
          await closed;
        },
        { before: (app) => app.use(watch) },
      );
      await get(url, { signal: controller.signal });
    }
    await eventually(() => expect(seen).toEqual(['false', 'false']));
  });
});
