import { setImmediate as nextTurn } from 'node:timers/promises';
import type { ErrorRequestHandler } from 'express';
import { sessionErrorHandler } from 'express-knex-session';
import { get, keepAliveAgent } from './support/http';
import { answerErrors, flavours, type Handler, insert, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();
const failure = Object.assign(new Error('late'), { status: 418 });

describe.each(flavours)('on $version', (flavour) => {
  const { route } = flavour;
  const serve = ledger.serving(flavour);
  /** What the same handler gives without this package. */
  const servePlain = (handler: Handler) => ledger.listen(flavour.express().use(route(handler)));

  // Hazards 25 and 26.
  describe('when the handler goes on after its response', () => {
    const deeds: [string, Handler][] = [
      [
        'throws',
        () => {
          throw failure;
        },
      ],
      ['sends a second response', (_req, res) => res.json({ second: 'a longer one' })],
      ['ends a second time', (_req, res) => res.on('error', () => {}).end('more')],
      ['sets a header', (_req, res) => res.setHeader('X-Late', 'late')],
      ['changes the status', (_req, res) => res.status(500)],
      ['writes', (_req, res) => void res.on('error', () => {}).write('more')],
      ['calls next()', (_req, _res, next) => next()],
      ['calls next(error)', (_req, _res, next) => next(failure)],
    ];
    const answerThen =
      (deed: Handler): Handler =>
      (req, res, next) => {
        res.status(201).cookie('kind', 'first').json({ first: 1 });
        return deed(req, res, next);
      };

    it.each(deeds)('%s: the client gets what a plain app sends, and the commit stands', async (_, deed) => {
      const { url: plainUrl } = await servePlain(answerThen(deed));
      const { url } = await serve(async (req, res, next) => {
        await insert(req, 'a');
        return answerThen(deed)(req, res, next);
      });

      const { status, body, complete, headers, error } = await get(url);

      const plain = await get(plainUrl);
      expect({ status, body, complete, error }).toEqual({
        status: plain.status,
        body: plain.body,
        complete: plain.complete,
        error: plain.error,
      });
      expect({ ...headers, date: '' }).toEqual({ ...plain.headers, date: '' });
      expect(status).toBe(201);
      expect(await ledger.stored()).toEqual(['a']);
    });

    it.each(deeds)('%s: the client gets the error of a COMMIT that fails, and no header of the handler', async (_, deed) => {
      const { url } = await serve(
        async (req, res, next) => {
          await insert(req, 'a', 'fail');
          return answerThen(deed)(req, res, next);
        },
        { errorHandlers: [] },
      );
      const answer = await get(url);
      expect(answer).toMatchObject({ status: 500, complete: true });
      expect(answer.body).toContain('refused at COMMIT');
      expect(answer.headers['set-cookie']).toBeUndefined();
      expect(answer.headers['x-late']).toBeUndefined();
      expect(await ledger.stored()).toEqual([]);
    });

    it('sends an error status, and rolls back, whatever comes after', async () => {
      const { url, errors } = await serve(async (req, res) => {
        await insert(req, 'a');
        res.status(409).send('mine');
        throw failure;
      });
      expect(await get(url)).toMatchObject({ status: 409, body: 'mine', complete: true });
      expect(errors).toEqual([failure]);
      expect(await ledger.stored()).toEqual([]);
    });
  });

  // Hazard 37, and: the server must survive it.
  describe("when the old handler's error comes while an error handler is still at work", () => {
    /** Answers when the old handler has long failed. */
    const answerLate: ErrorRequestHandler = async (error, _req, res, next) => {
      for (let turn = 0; turn < 20; turn++) await nextTurn();
      if (res.headersSent) return next(error);
      res.status(500).json({ message: error.message });
    };
    const handlers: [string, Handler][] = [
      [
        'after json()',
        async (req, res) => {
          await insert(req, 'a', 'fail');
          res.json({ ok: true });
          throw failure;
        },
      ],
      [
        'after json(), a few turns later',
        async (req, res) => {
          await insert(req, 'a', 'fail');
          res.json({ ok: true });
          await untilDiscarded(res);
          throw failure;
        },
      ],
      [
        'after write()',
        async (req, res) => {
          await insert(req, 'a', 'fail');
          res.write('half');
          await untilDiscarded(res);
          throw failure;
        },
      ],
      [
        'because it sets a header after write()',
        async (req, res) => {
          await insert(req, 'a', 'fail');
          res.write('half');
          await untilDiscarded(res);
          res.setHeader('X-Late', 'late');
        },
      ],
      [
        'because it answers once more',
        async (req, res) => {
          await insert(req, 'a', 'fail');
          res.json({ ok: true });
          await untilDiscarded(res);
          res.status(200).json({ ok: true });
        },
      ],
    ];
    it.each(handlers)('%s: the client gets the error of COMMIT', async (_, handler) => {
      const { url } = await serve(handler, { errorHandlers: [sessionErrorHandler(), answerLate] });
      expect(await get(url)).toMatchObject({ status: 500, body: '{"message":"note a is refused at COMMIT"}', complete: true });
      expect(await ledger.stored()).toEqual([]);
    });

    // An error that comes before COMMIT has failed takes the error handlers; the default one is left.
    it.each(handlers)('%s: it does so too if sessionErrorHandler() is not mounted', async (_, handler) => {
      const { url } = await serve(handler, { errorHandlers: [answerLate] });
      expect(await get(url)).toMatchObject({ status: 500, body: expect.stringContaining('note a is refused at COMMIT'), complete: true });
      expect(await ledger.stored()).toEqual([]);
    });

    it('leaves the next request on the connection alone', async () => {
      const agent = keepAliveAgent();
      let fail: () => void = () => {};
      const { url } = await serve(
        async (req, res) => {
          if (req.path === '/next') return void res.send('fine');
          await insert(req, 'a', 'fail');
          res.write('half');
          await new Promise<void>((resolve) => {
            fail = resolve;
          });
          throw failure;
        },
        { errorHandlers: [sessionErrorHandler(), answerErrors([])] },
      );
      expect(await get(url, { agent })).toMatchObject({ status: 500, complete: true, headers: { connection: 'close' } });
      const next = get(`${url}/next`, { agent });
      fail();
      expect(await next).toMatchObject({ status: 200, body: 'fine', complete: true });
      agent.destroy();
    });

    it('leaves the status to the error handler, whatever the old handler sets', async () => {
      const { url } = await serve(
        async (req, res) => {
          await insert(req, 'a', 'fail');
          res.json({ ok: true });
          await untilDiscarded(res);
          res.status(304);
        },
        {
          errorHandlers: [
            async (_error, _req, res, _next) => {
              for (let turn = 0; turn < 20; turn++) await nextTurn();
              res.end('sorry');
            },
          ],
        },
      );
      expect(await get(url)).toMatchObject({ status: 500, body: 'sorry' });
    });
  });
});

/** The one thing that an application sees of it. */
async function untilDiscarded(res: { req: { session: { outcome: string } } }): Promise<void> {
  while (res.req.session.outcome === 'open') await nextTurn();
  await nextTurn();
}
