import compression from 'compression';
import express, { type Request, type RequestHandler, type Response } from 'express';
import { retryable, type SessionOptions, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import { timers } from './support/deadlines';
import { answerErrors, flavours, insert, useLedger } from './support/ledger';
import { eventually } from './support/pool';
import { conflict, retrying, type Serving, store, transient, type Work } from './support/retrying';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const ledger = useLedger();

const serve = retrying(ledger);

describe.each(flavours)('on $version', (flavour) => {
  describe('when another attempt would not help, or is not allowed', () => {
    const failures: Record<string, Work> = {
      'a constraint': (req) => req.session('notes').insert([{ id: 'a' }, { id: 'a' }]),
      'a constraint, at COMMIT': async (req, res) => void res.json(await insert(req, 'refused', 'fail')),
      'an error of the handler': () => Promise.reject(new Error('of the handler')),
      'an error with another code': () => Promise.reject(Object.assign(new Error('completion unknown'), { code: '40003' })),
      'a rejection that is no error': () => Promise.reject('40001'),
      'a lost connection': (req) => req.session.raw('SELECT pg_terminate_backend(pg_backend_pid())'),
      'an outcome that nobody knows (60)': async (req, res) => void res.json(await insert(req, 'unknown', 'die')),
      'an outcome that nobody knows, by hand, and then a transient error (60)': async (req) => {
        await insert(req, 'unknown', 'die');
        await req.session.commit().catch(() => Promise.reject(transient()));
      },
    };
    it.each(Object.entries(failures))('runs the handler once: %s (58)', async (_name, fail) => {
      const thrown: unknown[] = [];
      const site = await serve(
        async (req, res, next, attempt) => {
          await store(req, attempt);
          await Promise.resolve(fail(req, res, next, attempt)).catch((error) => {
            thrown.push(error);
            throw error;
          });
        },
        { flavour },
      );
      expect(await site.get()).toMatchObject({ status: 500, complete: true });
      expect(site.ran()).toBe(1);
      expect(site.errors).toHaveLength(1);
      for (const error of thrown) expect(site.errors[0]).toBe(error);
      expect(await ledger.stored()).toEqual([]);
    });

    it('passes on the very error of the last attempt, one that was thrown (59)', async () => {
      const thrown: unknown[] = [];
      const site = await serve(
        async (req, _res, _next, attempt) => {
          await store(req, attempt);
          thrown.push(transient());
          throw thrown.at(-1);
        },
        { flavour, attempts: 2 },
      );
      expect(await site.get()).toMatchObject({ status: 500 });
      expect(thrown).toHaveLength(2);
      expect(site.errors).toEqual([thrown[1]]);
      expect(site.errors[0]).toBe(thrown[1]);
      expect(await ledger.stored()).toEqual([]);
      await ledger.isClean();
      expect(site.sessions.stats()).toMatchObject({ committed: 0, rolledBack: 2, open: 0 });
    });

    it('passes on the error of the last COMMIT (59)', async () => {
      const site = await serve(async (req, res, _next, attempt) => void res.json(await conflict(req, attempt)), { flavour, attempts: 1 });
      expect(await site.get()).toMatchObject({ status: 500 });
      expect(site.errors).toEqual([expect.objectContaining({ code: '40001' })]);
      expect(site.ran()).toBe(1);
    });
  });

  describe('when something of the attempt stays', () => {
    type Kept = [work: Work, expected: { status?: number; stored: string[] }, options?: Serving];
    const rest: RequestHandler = (req, res, next) => void insert(req, 'next', 'conflict').then(() => res.json('next'), next);
    const fails: Work = () => Promise.reject(transient());
    const failsAtCommit: Work = async (req, res, _next, attempt) => void res.json(await conflict(req, attempt));
    const afterCheckpoint =
      (work: Work): Work =>
      (req, ...others) =>
        req.session.checkpoint().then(() => work(req, ...others));
    const middleware = (work: (req: Request) => unknown): Serving => ({
      before: [(req, _res, next) => void Promise.resolve(work(req)).then(() => next(), next)],
    });
    const kept: Record<string, Kept> = {
      'commit()': [(req) => req.session.commit().then(() => Promise.reject(transient())), { stored: ['stored by 1'] }],
      'a commit() that is under way': [
        (req, _res, next) => {
          void req.session.commit();
          next(transient());
        },
        { stored: ['stored by 1'] },
      ],
      'checkpoint(), then an error': [afterCheckpoint(fails), { stored: ['stored by 1'] }],
      'checkpoint(), then a statement, and an error': [
        afterCheckpoint((req) => insert(req, 'rest').then(() => Promise.reject(transient()))),
        { stored: ['stored by 1'] },
      ],
      'checkpoint(), and the COMMIT of the rest fails': [afterCheckpoint(failsAtCommit), { stored: ['stored by 1'] }],
      'checkpoint(), and a rollback() of the rest': [
        afterCheckpoint(async (req) => {
          await insert(req, 'rest');
          await req.session.rollback();
          throw transient();
        }),
        { stored: ['stored by 1'] },
      ],
      'next(), and a later handler fails at COMMIT': [(_req, _res, next) => next(), { stored: [] }, { after: [rest] }],
      'next(), and then its own error': [
        (_req, _res, next) => {
          next();
          throw transient();
        },
        { stored: [] },
        { after: [() => {}] },
      ],
      "next('router')": [(_req, _res, next) => next('router'), { status: 404, stored: [] }],
      'a response': [
        (_req, res) => {
          res.status(409).json({});
          throw transient();
        },
        { status: 409, stored: [] },
      ],
      'a byte that has left (61)': [
        (_req, res) => {
          res.write('a byte');
          throw transient();
        },
        { status: 200, stored: [] },
        { commitAt: 'end' },
      ],
      'a byte that has left, and COMMIT fails (61)': [
        (req, res, _next, attempt) => {
          res.write('a byte');
          return conflict(req, attempt).then(() => void res.end());
        },
        { status: 200, stored: [] },
        { commitAt: 'end' },
      ],
      'a response that has been sent before COMMIT': [failsAtCommit, { status: 200, stored: [] }, { commitAt: 'finish' }],
      'a statement that has committed by itself': [fails, { stored: ['stored by 1'] }, { transaction: false }],
      'the work of a middleware': [fails, { stored: [] }, middleware((req) => insert(req, 'before'))],
      'the hook of a middleware': [fails, { stored: [] }, middleware((req) => req.session.afterCommit(() => {}))],
    };
    it.each(Object.entries(kept))('runs the handler once: %s', async (_name, [work, expected, options]) => {
      const site = await serve(
        async (req, res, next, attempt) => {
          await store(req, attempt);
          await work(req, res, next, attempt);
        },
        { flavour, ...options },
      );
      const answer = await site.get();
      expect(answer.status).toBe(expected.status ?? 500);
      expect(answer.complete).toBe(options?.commitAt !== 'end');
      await ledger.isClean();
      expect(await ledger.stored()).toEqual(expected.stored);
      expect(site.ran()).toBe(1);
    });
  });
});

describe('when bytes are with a compression that stands before the session', () => {
  const served = async (work: Work, options?: SessionOptions) => {
    let ran = 0;
    const app = express().use(compression({ threshold: 0 }), sessionMiddleware(ledger.knex, { onError() {}, ...options }));
    app.use(
      retryable((req, res, next) => work(req, res, next, ++ran)),
      sessionErrorHandler(),
      answerErrors([]),
    );
    const { url } = await ledger.listen(app);
    const body = await fetch(url)
      .then((response) => response.text())
      .catch(() => 'cut');
    return { body, ran };
  };
  const writing = (res: Response, attempt: number) => void res.type('text').write(`attempt ${attempt}`);
  const cases: Record<string, [Work, SessionOptions?]> = {
    'after a statement': [(req, res, _next, attempt) => store(req, attempt).then(() => writing(res, attempt)), { commitAt: 'end' }],
    'without a statement': [(_req, res, _next, attempt) => writing(res, attempt)],
    'before a statement': [
      (req, res, _next, attempt) => {
        writing(res, attempt);
        return store(req, attempt);
      },
      { commitAt: 'end' },
    ],
  };
  it.each(Object.entries(cases))('does not run the handler again: %s (61)', async (_name, [work, options]) => {
    const { body, ran } = await served(async (req, res, next, attempt) => {
      await work(req, res, next, attempt);
      if (attempt === 1) throw transient();
      res.end();
    }, options);
    expect(ran).toBe(1);
    expect(body).not.toContain('attempt 2');
    expect(await ledger.stored()).toEqual([]);
  });
});

describe('when nothing has left yet', () => {
  const streams: Record<string, (res: Response) => unknown> = {
    'no byte': () => {},
    'all that was declared, which waits for COMMIT': (res) => res.set('Content-Length', '9').write('attempt 1'),
  };
  it.each(Object.entries(streams))("runs again with commitAt: 'end' too: %s", async (_name, begin) => {
    const site = await serve(
      async (req, res, _next, attempt) => {
        await store(req, attempt);
        if (attempt === 1) {
          begin(res);
          throw transient();
        }
        res.write('attempt ');
        res.end('2');
      },
      { commitAt: 'end' },
    );
    expect(await site.get()).toMatchObject({ status: 200, complete: true, body: 'attempt 2' });
    expect(await ledger.stored()).toEqual(['stored by 2']);
  });
});

describe('when each statement commits by itself', () => {
  it('runs the handler once, also after its first statement has failed: others may be under way', async () => {
    const site = await serve(
      async (req, res, _next, attempt) => {
        const sibling = req.session.raw('INSERT INTO notes SELECT ? FROM pg_sleep(0.05)', [`sibling of ${attempt}`]).then();
        const failing = req.session.raw("DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$").then();
        await Promise.all([sibling, failing]);
        res.end();
      },
      { transaction: false },
    );
    expect(await site.get()).toMatchObject({ status: 500 });
    await eventually(async () => expect(await ledger.stored()).toEqual(['sibling of 1']));
    expect(site.ran()).toBe(1);
  });
});

describe('when the response has failed for good', () => {
  it('leaves it to the error handlers, whatever the old handler throws meanwhile', async () => {
    const isHandled = deferred();
    const hasThrown = deferred();
    const goOn = deferred();
    let before = 0;
    const site = await serve(
      async (req, res) => {
        await insert(req, 'refused', 'fail');
        res.status(201).json({});
        await isHandled.promise;
        setImmediate(hasThrown.resolve);
        throw transient();
      },
      {
        errorHandlers: (errors) => [
          sessionErrorHandler(),
          async (error, req, res, next) => {
            before ||= timers();
            isHandled.resolve();
            await goOn.promise;
            if (error.code === '23514') answerErrors(errors)(error, req, res, next);
          },
        ],
      },
    );
    const answer = site.get();
    await hasThrown.promise;
    // No pause is under way.
    await eventually(() => expect(timers()).toBeLessThanOrEqual(before));
    goOn.resolve();
    expect(await answer).toMatchObject({ status: 500, complete: true, body: expect.stringContaining('23514') });
    expect(site.ran()).toBe(1);
  });
});
