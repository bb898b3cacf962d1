import { once } from 'node:events';
import type { Request, Response } from 'express';
import { sessionErrorHandler } from 'express-knex-session';
import { get, RawClient } from './support/http';
import { flavours, type Handler, insert, type ServeOptions, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

/** Sends rows of the session while it is open, so that its first bytes leave before it ends. */
async function sendRows(req: Request, res: Response): Promise<void> {
  await insert(req, 'a');
  const rows = req.session.raw("SELECT i, repeat('x', 1000) AS x FROM generate_series(1, 50) AS i").stream();
  for await (const row of rows) {
    if (!res.write(JSON.stringify(row))) await once(res, 'drain');
  }
}

describe.each(flavours)('on $version', (flavour) => {
  const serve = ledger.serving(flavour);
  const failures: [string, Handler, ServeOptions][] = [
    [
      'throws, and the default error handler cuts the connection',
      async (req, res) => {
        await sendRows(req, res);
        throw new Error('mine');
      },
      { errorHandlers: [sessionErrorHandler()] },
    ],
    [
      'throws, and an error handler passes the error on, as it should',
      async (req, res) => {
        await sendRows(req, res);
        throw new Error('mine');
      },
      {},
    ],
    [
      'swallows the error of a statement',
      async (req, res) => {
        await sendRows(req, res);
        await req.session.raw('SELECT 1/0').catch(() => {});
        res.end();
      },
      {},
    ],
    [
      'has a COMMIT that fails',
      async (req, res) => {
        await insert(req, 'b', 'fail');
        await sendRows(req, res);
        res.end();
      },
      {},
    ],
  ];

  describe.each(failures)('when a handler that streams rows of its session %s', (_, handler, options) => {
    it.each(['HTTP/1.1', 'HTTP/1.0'])('rolls back, and a client of %s cannot take the response for whole', async (version) => {
      const { port } = await serve(handler, { onError: () => {}, ...options });
      const client = await RawClient.connect(port);
      client.write(`GET / ${version}\r\nHost: localhost\r\nConnection: close\r\n\r\n`);
      const error = await client.closed;
      expect(client.received).toMatch(/^HTTP\/1\.1 200 OK/);
      if (version === 'HTTP/1.1') expect(client.received.endsWith('\r\n0\r\n\r\n')).toBe(false);
      // It takes FIN for the end of the response.
      else expect(error).toMatchObject({ code: 'ECONNRESET' });
      await ledger.isClean();
      expect(await ledger.stored()).toEqual([]);
    });
  });

  describe('when a handler that streams rows of its session throws, and an error handler ends the response', () => {
    it('lets no client take it for whole', async () => {
      const { url } = await serve(
        async (req, res) => {
          await sendRows(req, res);
          throw new Error('mine');
        },
        { onError: () => {}, errorHandlers: [sessionErrorHandler(), (_error, _req, res, _next) => res.end()] },
      );
      expect(await get(url)).toMatchObject({ status: 200, complete: false });
      expect(await ledger.stored()).toEqual([]);
    });
  });
});
