import { AsyncLocalStorage } from 'node:async_hooks';
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { ErrorRequestHandler, Request, Response } from 'express';
import { sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import { get } from './support/http';
import { answerErrors, flavours, type Handler, insert, useLedger } from './support/ledger';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

describe.each(flavours)('on $version', (flavour) => {
  const { express, route } = flavour;
  const serve = ledger.serving(flavour);

  describe('when the error handlers answer a failed COMMIT', () => {
    const refused: Handler = async (req, res) => {
      await insert(req, 'a', 'fail');
      res.status(201).cookie('kind', 'mine').json({ ok: true });
    };

    it.each([200, 201, 204, 299])('lets no %d leave', async (status) => {
      const { url } = await serve(refused, { errorHandlers: [(_error, _req, res, _next) => res.status(status).send('all well')] });
      expect(await get(url)).toMatchObject({ status: 500, complete: true });
    });

    it('lets no 2xx of writeHead leave', async () => {
      const { url } = await serve(refused, { errorHandlers: [(_error, _req, res, _next) => res.writeHead(200).end('all well')] });
      expect(await get(url)).toMatchObject({ status: 500, complete: true });
    });

    it.each([302, 400, 409, 503])('lets a %d go', async (status) => {
      const { url } = await serve(refused, {
        errorHandlers: [sessionErrorHandler(), (_error, _req, res, _next) => res.status(status).send('sorry')],
      });
      expect(await get(url)).toMatchObject({ status, body: 'sorry', complete: true });
    });

    it('waits for one that takes its time', async () => {
      const answerLater: ErrorRequestHandler = async (_error, _req, res, _next) => {
        const found = await ledger.stored();
        await nextTurn();
        res.status(409).cookie('reason', 'refused').json({ found });
      };
      const { url } = await serve(refused, { errorHandlers: [sessionErrorHandler(), answerLater] });
      expect(await get(url)).toMatchObject({ status: 409, body: '{"found":[]}', headers: { 'set-cookie': ['reason=refused; Path=/'] } });
    });

    it('lets one stream its answer', async () => {
      const stream: ErrorRequestHandler = async (_error, _req, res, _next) => {
        res.write('one ');
        await nextTurn();
        res.write('two ');
        await nextTurn();
        res.end('three');
      };
      const { url } = await serve(refused, { errorHandlers: [sessionErrorHandler(), stream] });
      expect(await get(url)).toMatchObject({ status: 500, body: 'one two three', complete: true });
    });

    it('lets one pass another error on', async () => {
      const { url } = await serve(refused, {
        errorHandlers: [
          sessionErrorHandler(),
          (error, _req, _res, next) => next(Object.assign(new Error('translated'), { status: 422, cause: error })),
          answerErrors([]),
        ],
      });
      expect(await get(url)).toMatchObject({ status: 422, body: '{"message":"translated"}' });
    });

    it.each([[true], [false]])('is content with the default error handler (sessionErrorHandler mounted: %p)', async (isMounted) => {
      const { url } = await serve(refused, { errorHandlers: isMounted ? [sessionErrorHandler()] : [] });
      const answer = await get(url);
      expect(answer).toMatchObject({ status: 500, complete: true });
      expect(answer.headers['content-type']).toMatch('text/html');
      expect(answer.headers['set-cookie']).toBeUndefined();
    });

    it('runs them in the context of the request (AsyncLocalStorage)', async () => {
      const context = new AsyncLocalStorage<string>();
      const seen: unknown[] = [];
      const app = express();
      app.use((req, _res, next) => context.run(req.path, next));
      app.use(sessionMiddleware(ledger.knex), route(refused), sessionErrorHandler());
      app.use(((_error, _req, res, _next) => {
        seen.push(context.getStore());
        res.sendStatus(409);
      }) as ErrorRequestHandler);
      const { url } = await ledger.listen(app);
      // The second request finds the connection that the first has opened.
      for (const path of ['/1', '/2']) expect(await get(url + path)).toMatchObject({ status: 409 });
      expect(seen).toEqual(['/1', '/2']);
    });

    it('lets no 2xx leave either of a later route, if one of them goes on without the error', async () => {
      const { url } = await serve(refused, {
        errorHandlers: [(_error, _req, _res, next) => next(), ((_req: Request, res: Response) => res.json({ ok: true })) as never],
      });
      expect(await get(url)).toMatchObject({ status: 500, complete: true });
    });

    it('answers by the default error handler if one of them fails', async () => {
      const broken: ErrorRequestHandler = async (_error, _req, _res, _next) => {
        throw new Error('broken');
      };
      const sync: ErrorRequestHandler = (_error, _req, _res, _next) => {
        throw new Error('broken');
      };
      const { url } = await serve(refused, { errorHandlers: [flavour.version === 'Express 5' ? broken : sync] });
      expect(await get(url)).toMatchObject({ status: 500, body: expect.stringContaining('broken'), complete: true });
    });

    // Scenario 25.
    it('shows them a completed session, and refuses its statements by name', async () => {
      const tell: ErrorRequestHandler = async (error, req, res, _next) => {
        const { session } = req;
        const refusal = await insert(req, 'late').catch((reason) => reason);
        const execution = await session.executionPromise.catch((reason) => reason);
        res.json({
          outcome: session.outcome,
          isCompleted: session.isCompleted(),
          refusal: refusal.code,
          isSameError: execution === error,
          used: poolUsage(ledger.knex).used,
        });
      };
      const { url } = await serve(refused, { errorHandlers: [sessionErrorHandler(), tell] });
      expect(JSON.parse((await get(url)).body)).toEqual({
        outcome: 'rolled back',
        isCompleted: true,
        refusal: 'ERR_SESSION_CLOSED',
        isSameError: true,
        used: 0,
      });
      expect(await ledger.stored()).toEqual([]);
    });
  });
});
