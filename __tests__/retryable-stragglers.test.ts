import { join } from 'node:path';
import { Readable } from 'node:stream';
import type { NextFunction, Request, Response } from 'express';
import { currentSession, getSession, type Session, scopedSession, sessionMiddleware } from 'express-knex-session';
import { insert, useLedger } from './support/ledger';
import { retrying, transient } from './support/retrying';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const ledger = useLedger();

const serve = retrying(ledger);
const FILE = join(__dirname, '../package.json');

describe('when the first attempt still works', () => {
  type Both = Request & { db: Session };
  const code = (work: PromiseLike<unknown>): Promise<unknown> =>
    Promise.resolve(work).then(
      () => 'stored',
      (error: { code?: string }) => error.code,
    );
  const codeOf = (call: () => unknown): unknown => {
    try {
      return call();
    } catch (error) {
      return (error as { code?: string }).code;
    }
  };
  const CLOSED = 'ERR_SESSION_CLOSED';
  const note = { id: 'late' };

  /** What the first attempt does late, made before it fails; and how it is refused, if it is not dropped. */
  const stragglers: Record<string, (req: Both, res: Response, next: NextFunction) => [late: () => unknown, refusal?: unknown]> = {
    'a statement on req.session': (req) => [() => code(insert(req, 'late')), CLOSED],
    'a statement on a session that it has kept': ({ session }) => [() => code(session('notes').insert(note)), CLOSED],
    'a statement that was built before': (req) => {
      const late = insert(req, 'late');
      return [() => code(late), CLOSED];
    },
    'the first statement on another session': (req) => [() => code(req.db('notes').insert(note)), CLOSED],
    'getSession(req)': (req) => [() => code(getSession(req)('notes').insert(note)), CLOSED],
    'the request of its response': (_req, res) => [() => code(insert(res.req, 'late')), CLOSED],
    'currentSession()': () => [() => code(currentSession('session')('notes').insert(note)), CLOSED],
    'a scoped session': () => [() => code(scopedSession(ledger.knex)('notes').insert(note)), CLOSED],
    'a savepoint': (req) => [() => code(req.session.transaction((trx) => trx('notes').insert(note))), CLOSED],
    'commit() and rollback()': (req) => [() => Promise.all([code(req.session.commit()), code(req.db.rollback())]), expect.anything()],
    'a checkpoint': (req) => [() => code(req.session.checkpoint()), CLOSED],
    settings: (req) => [() => code(req.session.set({ 'app.late': 'yes' })), CLOSED],
    hooks: (req) => [() => codeOf(() => req.session.afterCommit(() => insert(req, 'late'))), CLOSED],
    'setRollbackOnly()': (req) => [() => codeOf(() => req.session.setRollbackOnly()), CLOSED],
    'headers, cookies, a status': (_req, res) => [
      () => {
        res.set('X-Late', '1').cookie('late', '1').status(418).statusMessage = 'Late';
      },
    ],
    json: (_req, res) => [() => void res.status(500).json({ late: true })],
    'the response of its request': (req) => [() => void req.res?.set('X-Late', '1').json({ late: true })],
    'a write and an end': (_req, res) => [() => void [res.write('late'), res.end('late')]],
    'a head': (_req, res) => [() => void res.writeHead(500, { 'X-Late': '1' }).flushHeaders()],
    sendFile: (_req, res) => [() => void res.sendFile(FILE)],
    'a pipe': (_req, res) => [() => void Readable.from(['late', 'late']).pipe(res)],
    'a redirect': (_req, res) => [() => void res.redirect('/late')],
    'destroying the response': (_req, res) => [() => void res.destroy()],
    'next()': (_req, _res, next) => [() => next()],
    "next('route')": (_req, _res, next) => [() => next('route')],
    'next(error)': (_req, _res, next) => [() => next(new Error('late'))],
    'next(error), a transient one': (_req, _res, next) => [() => next(transient())],
    "its request's next": (req, _res) => {
      const { next } = req;
      return [() => next?.(new Error('late'))];
    },
  };

  describe.each(['an error', 'COMMIT'])('after it has failed by %s', (failure) => {
    it.each(Object.entries(stragglers))('has no part in the last one: %s', async (_name, straggler) => {
      const lastHasBegun = deferred();
      const done = deferred<unknown>();
      let refusal: unknown;
      const site = await serve(
        async (req, res, next, attempt) => {
          await insert(req, `stored by ${attempt}`, attempt === 1 && failure === 'COMMIT' ? 'conflict' : undefined);
          if (attempt === 1) {
            const [late, expected] = straggler(req as Both, res, next);
            refusal = expected;
            void lastHasBegun.promise.then(late).then(done.resolve, done.resolve);
            if (failure === 'an error') throw transient();
          } else {
            lastHasBegun.resolve();
            refusal = [await done.promise, refusal];
          }
          res.json({ attempt });
        },
        { context: true, before: [sessionMiddleware(ledger.knex, { property: 'db' })] },
      );
      const answer = await site.get();
      expect(answer).toMatchObject({ status: 200, complete: true, body: '{"attempt":2}' });
      const [got, expected] = refusal as [unknown, unknown];
      expect(got).toEqual(expected);
      expect(answer.headers).not.toHaveProperty('x-late');
      expect(answer.headers).not.toHaveProperty('set-cookie');
      expect(await ledger.stored()).toEqual(['stored by 2']);
      expect([site.ran(), site.errors, site.reported]).toEqual([2, [], []]);
    });
  });

  it('leaves out what it has not awaited, and the siblings in a Promise.all (hazard 39)', async () => {
    const late: Promise<unknown>[] = [];
    const site = await serve(async (req, res, _next, attempt) => {
      if (attempt === 1) {
        late.push(code(insert(req, 'not awaited')));
        const failing = insert(req, 'before it').then(() => Promise.reject(transient()));
        const sibling = req.session.raw('SELECT pg_sleep(0.02)').then(() => insert(req, 'sibling'));
        late.push(code(sibling));
        await Promise.all([sibling, failing]);
      }
      await insert(req, `stored by ${attempt}`);
      res.json({ attempt });
    });
    expect(await site.get()).toMatchObject({ status: 200, body: '{"attempt":2}' });
    expect(await Promise.all(late)).toEqual([CLOSED, CLOSED]);
    expect(await ledger.stored()).toEqual(['stored by 2']);
  });

  it('drops the response that comes while it is rolled back', async () => {
    const { knex, proxy } = await ledger.throughProxy();
    const isRollingBack = deferred();
    const goOn = deferred();
    proxy.onFrontend((message) => {
      if (!message.text.startsWith('ROLLBACK')) return undefined;
      isRollingBack.resolve();
      return goOn.promise;
    });
    const site = await serve(
      async (req, res, _next, attempt) => {
        await insert(req, `stored by ${attempt}`);
        if (attempt === 1) {
          void isRollingBack.promise.then(() => {
            res.status(418).set('X-Late', '1').json({ attempt });
            setImmediate(goOn.resolve);
          });
          throw transient();
        }
        res.json({ attempt });
      },
      { knex },
    );
    const answer = await site.get();
    expect(answer).toMatchObject({ status: 200, body: '{"attempt":2}' });
    expect(answer.headers).not.toHaveProperty('x-late');
    expect(await ledger.stored()).toEqual(['stored by 2']);
  });
});
