import { Readable } from 'node:stream';
import express, { type ErrorRequestHandler, type Response } from 'express';
import { sessionErrorHandler } from 'express-knex-session';
import { deferred, REFUSED, refusedAfter, useGatedApps } from './support/gated-app';
import { get, keepAliveAgent, RawClient, request } from './support/http';
import { flavours } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

const asJson: ErrorRequestHandler = (error, _req, res, _next) => {
  res.json({ code: error.code });
};
const REFUSAL = '{"code":"23514"}';

describe.each(flavours)('on $version', (flavour) => {
  const apps = useGatedApps(flavour);

  describe('when COMMIT fails and error handlers answer', () => {
    it.each<[string, (res: Response) => unknown]>([
      ['no status', (res) => res.end('a')],
      ['status 200', (res) => res.status(200).json({})],
      ['status 201 in writeHead', (res) => res.writeHead(201).end('a')],
      ['status 204', (res) => res.sendStatus(204)],
      ['status 200, written in parts', (res) => Readable.from(['a', 'b']).pipe(res.status(200))],
      ['flushHeaders', (res) => res.status(200).flushHeaders()],
      ['status 200 and a file', (res) => res.status(200).sendFile(__filename)],
    ])('never lets them send a success: %s (12, 19)', async (_name, answer) => {
      const { port } = await apps.gated(
        refusedAfter((_req, res) => res.end()),
        { errorHandlers: [(_error, _req, res, _next) => answer(res)] },
      );
      const client = await RawClient.connect(port);
      client.get('/');
      await client.readUntil('\r\n\r\n');
      expect(client.received).toMatch(/^HTTP\/1.1 500 /);
      await client.destroy();
    });

    it.each([[302], [404], [409], [503]])('lets them choose another status: %d', async (status) => {
      const { url } = await apps.gated(
        refusedAfter((_req, res) => res.end()),
        {
          errorHandlers: [(_error, _req, res, _next) => res.status(status).end('a')],
        },
      );
      expect(await get(url)).toMatchObject({ status, body: 'a', complete: true });
    });

    it.each([
      [418, 418],
      [200, 500],
      [99, 500],
      ['404', 500],
      [undefined, 500],
    ])("starts from the error's status %p: %d", async (given, status) => {
      const failure = Object.assign(new Error('no'), { status: given });
      const { url } = await apps.gated(
        async (req, res) => {
          await req.session('entries').insert({ name: 'entry' });
          res.end();
        },
        {
          shouldCommit: () => {
            throw failure;
          },
          errorHandlers: [(error, _req, res, _next) => res.end(String(error === failure))],
        },
      );
      expect(await get(url)).toMatchObject({ status, body: 'true' });
      expect(await apps.names()).toEqual([]);
    });

    it('shows them a request as the route had it, and passes by those of a nested router first (18)', async () => {
      const seen: unknown[] = [];
      const router = express.Router();
      router.post('/:id', async (req, res) => {
        await req.session('entries').insert({ name: REFUSED });
        res.json({ ok: true });
      });
      router.use(sessionErrorHandler());
      router.use(((error, req, _res, next) => {
        seen.push(['nested', req.baseUrl, req.url, error.code]);
        next(error);
      }) as ErrorRequestHandler);
      const { url } = await apps.gated((_req, _res, next) => next(), {
        after: (app) => app.use('/nested', router),
        errorHandlers: [
          (error, req, res, _next) => {
            seen.push(['app', req.baseUrl, req.url, req.originalUrl]);
            res.json({ code: error.code, outcome: req.session.outcome, isCompleted: req.session.isCompleted() });
          },
        ],
      });
      const answer = await request(`${url}/nested/5?a=b`, { method: 'POST' });
      expect(answer).toMatchObject({ status: 500, body: '{"code":"23514","outcome":"rolled back","isCompleted":true}' });
      expect(seen).toEqual([
        ['nested', '/nested', '/5?a=b', '23514'],
        ['app', '', '/nested/5?a=b', '/nested/5?a=b'],
      ]);
    });

    it('serves the next request on the connection', async () => {
      let count = 0;
      const { url, sockets } = await apps.gated(
        async (req, res) => {
          await req.session('entries').insert({ name: count++ % 2 ? 'entry' : REFUSED });
          res.json({ count });
        },
        { errorHandlers: [asJson] },
      );
      const agent = keepAliveAgent();
      const bodies: string[] = [];
      for (let i = 0; i < 6; i++) bodies.push((await get(url, { agent })).body);
      expect(bodies).toEqual([REFUSAL, '{"count":2}', REFUSAL, '{"count":4}', REFUSAL, '{"count":6}']);
      expect(sockets).toHaveLength(1);
      agent.destroy();
    });

    it('cuts the connection if one of them hangs and the server is shut down', async () => {
      const reached = deferred();
      const { url, server } = await apps.gated(
        refusedAfter((_req, res) => res.end()),
        { errorHandlers: [(_error, _req, _res, _next) => reached.resolve()] },
      );
      const answer = get(url);
      await reached.promise;
      const closed = new Promise((resolve) => server.close(resolve));
      server.closeAllConnections();
      expect(await answer).toMatchObject({ status: 0, complete: false });
      await closed;
    });
  });

  describe('when the client has gone by the time COMMIT fails', () => {
    it('tells the error handlers, whose answer goes nowhere, and serves others (30)', async () => {
      const told = deferred<unknown>();
      const { port, url } = await apps.gated(
        refusedAfter((req, res) => (req.url === '/next' ? res.status(400).end() : res.json({ ok: true }))),
        {
          errorHandlers: [
            (error, _req, res, _next) => {
              told.resolve(error.code);
              res.status(500).json({ code: error.code });
            },
          ],
        },
      );
      const hold = apps.hold();
      const client = await RawClient.connect(port);
      client.get('/');
      await hold.reached;
      await client.reset();
      hold.release();
      expect(await told.promise).toBe('23514');
      await eventually(() => expect(poolUsage(apps.knex).used).toBe(0));
      expect(await get(`${url}/next`)).toMatchObject({ status: 400 });
    });
  });
});
