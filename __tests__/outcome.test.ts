import { setImmediate as nextTurn } from 'node:timers/promises';
import type { ErrorRequestHandler, Response } from 'express';
import { sessionErrorHandler } from 'express-knex-session';
import { get, RawClient } from './support/http';
import { express4Flavour, flavours, type Handler, insert, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();
const used = () => poolUsage(ledger.knex).used;

describe.each(flavours)('on $version', (flavour) => {
  const serve = ledger.serving(flavour);

  describe('when the response says success', () => {
    // Scenarios 8 and 9.
    it.each([200, 201, 204, 206, 301, 303, 304, 399])('commits before a %d leaves, and gives the connection back', async (status) => {
      const { url } = await serve(async (req, res) => {
        await insert(req, 'a');
        expect(used()).toBe(1);
        res.status(status).end();
      });

      const answer = await get(url);

      // At once: neither may come after the response.
      expect(used()).toBe(0);
      expect(await ledger.stored()).toEqual(['a']);
      expect(answer).toMatchObject({ status, complete: true });
    });

    const endings: [string, (res: Response) => void][] = [
      ['json()', (res) => res.json({ ok: true })],
      ['send()', (res) => res.send('ok')],
      ['redirect()', (res) => res.redirect('/elsewhere')],
      ['sendStatus()', (res) => res.sendStatus(202)],
      ['writeHead() and end()', (res) => res.writeHead(200, { 'X-Mine': 'yes' }).end('ok')],
      ['write()', (res) => res.write('ok')],
      ['flushHeaders()', (res) => res.flushHeaders()],
    ];
    it.each(endings)('lets no byte of %s leave while COMMIT is under way', async (_, end) => {
      const held = await ledger.holdCommits();
      const { port } = await serve(async (req, res) => {
        await insert(req, 'a', 'wait');
        end(res);
      });
      const client = await RawClient.connect(port);
      client.get('/');
      await held.waiting();
      expect(client.received).toBe('');

      await held.release();

      await client.readUntil('\r\n\r\n');
      expect(client.received).toMatch(/^HTTP\/1\.1 (2|3)/);
      expect(await ledger.stored()).toEqual(['a']);
      await client.destroy();
    });
  });

  // Hazard 22.
  describe('when the handler does not await its statements', () => {
    const later = async (turn: Promise<unknown>, ...[req, id]: Parameters<typeof insert>) => {
      await turn;
      await insert(req, id);
    };
    it('commits those that were issued before its response, and behind it in the same turn of the event loop', async () => {
      const { url } = await serve((req, res) => {
        insert(req, 'before').catch(() => {});
        res.sendStatus(201);
        insert(req, 'behind').catch(() => {});
        later(Promise.resolve(), req, 'in a microtask').catch(() => {});
      });
      expect(await get(url)).toMatchObject({ status: 201 });
      expect(await ledger.stored()).toEqual(['before', 'behind', 'in a microtask']);
    });

    it('answers with an error if one of them fails', async () => {
      const { url } = await serve((req, res) => {
        for (const id of ['same', 'same']) insert(req, id).catch(() => {});
        res.sendStatus(201);
      });
      expect(await get(url)).toMatchObject({ status: 500, body: expect.stringContaining('ERR_TRANSACTION_ABORTED') });
      expect(await ledger.stored()).toEqual([]);
    });

    it('refuses by name those that come a turn later', async () => {
      let refusal: unknown;
      const { url } = await serve((req, res) => {
        insert(req, 'before').catch(() => {});
        res.sendStatus(201);
        later(nextTurn().then(nextTurn), req, 'late').catch((error) => {
          refusal = error;
        });
      });
      expect(await get(url)).toMatchObject({ status: 201 });
      await eventually(() => expect(refusal).toMatchObject({ code: 'ERR_SESSION_CLOSED' }));
      expect(await ledger.stored()).toEqual(['before']);
    });
  });

  describe('when the handler answers with an error status', () => {
    // Scenario 10.
    it.each([400, 404, 409, 422, 500, 503])('rolls back before a %d leaves, and keeps the response', async (status) => {
      const { url, errors } = await serve(async (req, res) => {
        await insert(req, 'a');
        res.status(status).set('X-Mine', 'yes').cookie('kind', 'mine').json({ mine: true });
      });

      const answer = await get(url);

      expect(used()).toBe(0);
      expect(answer).toMatchObject({ status, headers: { 'x-mine': 'yes', 'set-cookie': ['kind=mine; Path=/'] }, body: '{"mine":true}' });
      expect(await ledger.stored()).toEqual([]);
      expect(errors).toEqual([]);
    });

    it('goes by the status of writeHead', async () => {
      const { url } = await serve(async (req, res) => {
        await insert(req, 'a');
        res.writeHead(409).end();
      });
      expect(await get(url)).toMatchObject({ status: 409 });
      expect(await ledger.stored()).toEqual([]);
    });
  });

  // Scenario 11.
  describe('when the handler fails', () => {
    const failure = Object.assign(new Error('mine'), { status: 418, code: 'MINE' });
    const fail: Handler = async (req) => {
      await insert(req, 'a');
      throw failure;
    };

    it('by a throw: rolls back, and passes the same error on', async () => {
      const { url, errors } = await ledger.serve(flavour, (app) => {
        app.use(
          flavour.route(async (req, _res, next) => {
            await insert(req, 'a');
            next();
          }),
        );
        app.get('/', () => {
          throw failure;
        });
      });
      expect(await get(url)).toMatchObject({ status: 418, body: '{"code":"MINE","message":"mine"}' });
      expect(errors).toEqual([failure]);
      expect(errors[0]).toBe(failure);
      expect(await ledger.stored()).toEqual([]);
    });

    const failures: [string, Handler][] = [
      ['a rejection', fail],
      [
        'next(error)',
        async (req, _res, next) => {
          await insert(req, 'a');
          next(failure);
        },
      ],
      [
        'a rejection while a statement is under way that nobody awaits',
        async (req) => {
          await insert(req, 'a');
          insert(req, 'b').catch(() => {});
          throw failure;
        },
      ],
    ];
    it.each(failures)('by %s: rolls back, and passes the same error on', async (_, handler) => {
      const { url, errors } = await serve(handler);

      expect(await get(url)).toMatchObject({ status: 418, body: '{"code":"MINE","message":"mine"}' });

      expect(used()).toBe(0);
      expect(errors).toHaveLength(1);
      expect(errors[0]).toBe(failure);
      expect(await ledger.stored()).toEqual([]);
    });

    it('by a statement: rolls back, and passes the error of the driver on untouched', async () => {
      let thrown: unknown;
      const { url, errors } = await serve(async (req) => {
        await insert(req, 'a');
        await insert(req, 'a').catch((error) => {
          thrown = error;
          throw error;
        });
      });

      expect(await get(url)).toMatchObject({ status: 500 });

      expect(errors).toHaveLength(1);
      expect(errors[0]).toBe(thrown);
      expect(errors[0]).toMatchObject({ code: '23505', message: expect.stringContaining('duplicate key') });
      expect(errors[0].cause).toBeUndefined();
      expect(await ledger.stored()).toEqual([]);
    });

    // Scenario 12.
    it.each([200, 201, 302, 500])('has rolled back before the error handlers run, which answer %d', async (status) => {
      const answer: ErrorRequestHandler = (_error, req, res, _next) => {
        const { session } = req;
        res.status(status).json({ used: used(), outcome: session.outcome, isCompleted: session.isCompleted() });
      };
      const { url } = await serve(fail, { errorHandlers: [sessionErrorHandler(), answer] });

      expect(await get(url)).toMatchObject({ status, body: '{"used":0,"outcome":"rolled back","isCompleted":true}' });
      expect(await ledger.stored()).toEqual([]);
    });

    it('keeps it so if the error handler takes its time before it answers 200', async () => {
      const answer: ErrorRequestHandler = async (_error, _req, res, _next) => {
        res.status(200).json(await ledger.stored());
      };
      const { url } = await serve(fail, { errorHandlers: [sessionErrorHandler(), answer] });
      expect(await get(url)).toMatchObject({ status: 200, body: '[]' });
      expect(await ledger.stored()).toEqual([]);
    });

    it('refuses a statement of an error handler by name', async () => {
      const log: ErrorRequestHandler = async (error, req, _res, next) => {
        await insert(req, 'log').then(
          () => next(error),
          (refusal) => next(Object.assign(refusal, { cause: error })),
        );
      };
      const { url } = await serve(fail, { errorHandlers: [sessionErrorHandler(), log, echo] });
      const answer = JSON.parse((await get(url)).body);
      expect(answer).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('an error went to the error handlers') });
      expect(await ledger.stored()).toEqual([]);
    });

    it('rolls back at the response if only the default error handler is there', async () => {
      const { url } = await serve(fail, { errorHandlers: [] });
      const answer = await get(url);
      expect(answer).toMatchObject({ status: 418, complete: true });
      expect(used()).toBe(0);
      expect(await ledger.stored()).toEqual([]);
    });

    it('goes by the status of the error handlers if sessionErrorHandler() is not mounted', async () => {
      const { url } = await serve(fail, { errorHandlers: [(_error, req, res, _next) => res.status(Number(req.query['status'])).end()] });
      expect(await get(`${url}?status=500`)).toMatchObject({ status: 500 });
      expect(await ledger.stored()).toEqual([]);
      expect(await get(`${url}?status=200`)).toMatchObject({ status: 200 });
      expect(await ledger.stored()).toEqual(['a']);
    });

    it('is not failed by next("route"), which is no error', async () => {
      const { url } = await ledger.serve(flavour, (app) => {
        app.get(
          '/',
          flavour.route(async (req, _res, next) => {
            await insert(req, 'a');
            next('route');
          }),
          fail,
        );
        app.get('/', (_req, res) => res.sendStatus(200));
      });
      expect(await get(url)).toMatchObject({ status: 200 });
      expect(await ledger.stored()).toEqual(['a']);
    });
  });
});

const echo: ErrorRequestHandler = (error, _req, res, _next) => {
  res.status(500).json({ code: error.code, message: error.message });
};

describe('when an async handler rejects on Express 4, which drops its promise', () => {
  it('reaches no error handler, and rolls back when the client gives up', async () => {
    let rejection: Promise<unknown> | undefined;
    const { port, errors } = await ledger.serve(express4Flavour, (app) =>
      app.use((req) => {
        rejection = (async () => {
          await insert(req, 'a');
          throw new Error('lost');
        })();
        // In a real application this is an unhandled rejection, and the end of the process.
        rejection.catch(() => {});
        return rejection;
      }),
    );
    const client = await RawClient.connect(port);
    client.get('/');
    await eventually(() => expect(rejection).toBeDefined());
    await expect(rejection).rejects.toThrow('lost');
    expect(used()).toBe(1);

    await client.destroy();

    await ledger.isClean();
    expect(errors).toEqual([]);
    expect(await ledger.stored()).toEqual([]);
  });
});
