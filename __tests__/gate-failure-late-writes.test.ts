import { once } from 'node:events';
import { createReadStream } from 'node:fs';
import { pipeline, Readable } from 'node:stream';
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { ErrorRequestHandler, Response } from 'express';
import { deferred, type Handler, REFUSED, refusedAfter, useGatedApps } from './support/gated-app';
import { get, keepAliveAgent, request } from './support/http';
import { flavours } from './support/ledger';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { attempt } from './support/wire-comparison';

failOnWarnings();

const asJson: ErrorRequestHandler = (error, _req, res, _next) => {
  res.json({ code: error.code });
};
const REFUSAL = '{"code":"23514"}';

describe.each(flavours)('on $version', (flavour) => {
  const apps = useGatedApps(flavour);

  /** What a handler that is still busy does after its response has been discarded. */
  const lateDeeds: Record<string, (res: Response) => unknown> = {
    'writes and ends': (res) => {
      attempt(() => res.write('late'));
      attempt(() => res.end('later'));
    },
    'ends with a success': (res) => {
      attempt(() => res.status(201).json({ late: true }));
      attempt(() => res.cookie('late', '1'));
      attempt(() => res.writeHead(200));
      attempt(() => res.flushHeaders());
    },
    throws: () => {
      throw new Error('late');
    },
    'writes for ever': async (res) => {
      while (!res.destroyed && !res.writableFinished) {
        res.write('late');
        await nextTurn();
      }
    },
    'does nothing': () => {},
  };

  describe('when COMMIT fails while the handler is still busy', () => {
    const names = Object.keys(lateDeeds);
    const moments = ['before the error response', 'in the middle of it', 'after it'] as const;

    it.each(names.flatMap((name) => moments.map((moment) => [name, moment] as const)))(
      'sends the error response, unmixed, and closes the connection: the handler %s %s (80, hazard 37)',
      async (name, moment) => {
        const goOn = deferred();
        const done = deferred();
        const act = async () => {
          goOn.resolve();
          if (name !== 'writes for ever') await done.promise;
          await nextTurn();
        };
        const { url, sockets } = await apps.gated(
          async (req, res) => {
            await req.session('entries').insert({ name: REFUSED });
            res.cookie('a', 'b').write('first');
            await goOn.promise;
            await nextTurn();
            try {
              await lateDeeds[name]?.(res);
            } finally {
              done.resolve();
            }
          },
          {
            errorHandlers: [
              async (error, _req, res, next) => {
                if (res.headersSent) return next(error);
                if (moment === 'before the error response') await act();
                res.status(503).write('sor');
                if (moment === 'in the middle of it') await act();
                res.end('ry');
              },
            ],
          },
        );
        const agent = keepAliveAgent();
        const answer = await request(url, { agent });
        goOn.resolve();
        expect(answer).toMatchObject({ status: 503, body: 'sorry', complete: true, headers: { connection: 'close' } });
        expect(answer.headers).not.toHaveProperty('set-cookie');
        await done.promise;
        // A request of someone else, on the same agent, gets a connection of its own.
        const next = await request(url, { agent });
        expect(next).toMatchObject({ status: 503, body: 'sorry' });
        expect(sockets).toHaveLength(2);
        agent.destroy();
      },
    );
  });

  describe('when COMMIT fails while a source is piped into the response', () => {
    it('unpipes it, sends the error response, and keeps the connection', async () => {
      const source = new Readable({ read() {} });
      const listeners: number[] = [];
      const { url, sockets } = await apps.gated(
        refusedAfter((req, res) => {
          if (req.url === '/not-piped') return res.end();
          source.push('a');
          return source.pipe(res);
        }),
        {
          errorHandlers: [
            (error, req, res, next) => {
              listeners.push(source.listenerCount('data'));
              asJson(error, req, res, next);
            },
          ],
        },
      );
      const agent = keepAliveAgent();
      expect(await get(url, { agent })).toMatchObject({ status: 500, body: REFUSAL, complete: true });
      expect(listeners).toEqual([0]);
      source.push('late');
      source.push(null);
      expect(await get(`${url}/not-piped`, { agent })).toMatchObject({ status: 500, body: REFUSAL, complete: true });
      expect(sockets).toHaveLength(1);
      agent.destroy();
    });

    it('ends a pipeline into the response with an error, and closes its source', async () => {
      const source = createReadStream(__filename);
      const ended = deferred<unknown>();
      const { url } = await apps.gated(
        refusedAfter((_req, res) => {
          pipeline(source, res, (error) => ended.resolve(error));
        }),
        { errorHandlers: [asJson] },
      );
      expect(await get(url)).toMatchObject({ status: 500, body: REFUSAL, complete: true });
      await ended.promise;
      await eventually(() => expect(source.destroyed).toBe(true));
    });

    it('closes the file of sendFile', async () => {
      const ended = deferred<unknown>();
      const { url } = await apps.gated(
        refusedAfter((_req, res) => res.sendFile(__filename, (error) => ended.resolve(error))),
        {
          errorHandlers: [asJson],
        },
      );
      expect(await get(url)).toMatchObject({ status: 500, body: REFUSAL, complete: true });
      await ended.promise;
    });
  });

  describe('when an error handler has lost its asynchronous context', () => {
    /** Calls back in the context of whoever made it: as a connection pool or a batching logger does. */
    class Queue {
      private readonly waiting: (() => void)[] = [];
      private readonly timer = setInterval(() => this.waiting.splice(0).forEach((callback) => void callback()), 1);
      add(callback: () => void): void {
        this.waiting.push(callback);
      }
      close(): void {
        clearInterval(this.timer);
      }
    }
    let queue: Queue;
    beforeEach(() => {
      queue = new Queue();
    });
    afterEach(() => queue.close());

    it.each<[string, Handler]>([
      ['has ended', (_req, res) => res.json({ ok: true })],
      [
        'goes on and ends',
        async (_req, res) => {
          res.write('a');
          await once(res, 'drain', { signal: AbortSignal.timeout(50) }).catch(() => {});
          res.end('b');
        },
      ],
      // A limit: one that goes on and throws without an end of its own keeps the client waiting for ever.
    ])('cuts the connection rather than keep the client waiting; the old handler %s', async (_name, answer) => {
      const { url } = await apps.gated(refusedAfter(answer), {
        errorHandlers: [
          (error, _req, res, next) => {
            if (res.headersSent) return next(error);
            queue.add(() => res.end('sorry'));
          },
        ],
      });
      const answered = await get(url);
      expect(answered.status === 0 || answered.status >= 400).toBe(true);
      expect(answered.body).not.toContain('a');
    });
  });
});
