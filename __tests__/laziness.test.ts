import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Request, Response } from 'express';
import { sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import { get, request } from './support/http';
import { controlOf, flavours, type Handler, insert, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

describe.each(flavours)('on $version', (flavour) => {
  const { express, route } = flavour;
  const serve = ledger.serving(flavour);

  // Scenario 1.
  describe('when the session is never used', () => {
    it('takes no connection, and sends no SQL', async () => {
      const { knex, proxy } = await ledger.throughProxy();
      const acquire = jest.spyOn(knex.client, 'acquireConnection');
      const { url } = await serve(
        (req, res) => void res.json([req.session.outcome, req.session.isCompleted(), req.session.isTransaction]),
        { knex },
      );

      expect(await get(url)).toMatchObject({ status: 200, body: '["unused",false,true]' });

      expect(acquire).not.toHaveBeenCalled();
      expect(proxy.connections()).toBe(0);
      expect(proxy.frontend).toEqual([]);
    });

    it('does not wrap the response, and does not listen to it', async () => {
      const face = (req: Request, res: Response) => ({
        own: Reflect.ownKeys(res).map(String).sort(),
        methods: [res.write, res.end, res.writeHead, res.flushHeaders].map((method) => method.toString()),
        listeners: ['close', 'finish', 'pipe', 'error'].map((event) => res.listenerCount(event)),
        socketListeners: req.socket.listenerCount('close'),
      });
      let during: unknown;
      const tell: Handler = (req, res) => {
        during = face(req, res);
        res.json({ ok: true });
      };
      const plain = await ledger.listen(express().use(tell));
      await get(plain.url);
      const expected = during;

      const { url } = await serve(tell);
      await get(url);

      expect(during).toEqual(expected);
    });

    it('does not wrap it either for looking at the session, building a query, or a query of the root knex', async () => {
      const { url } = await serve(async (req, res) => {
        const query = req.session('notes').where({ id: 'a' });
        expect(query.toString()).toContain('notes');
        expect(req.session.fn.now()).toBeDefined();
        await ledger.knex('notes').select();
        res.json(Object.hasOwn(res, 'end'));
      });
      expect(await get(url)).toMatchObject({ body: 'false' });
    });
  });

  // Scenario 2.
  describe('when the handler throws before any statement', () => {
    it('sends neither BEGIN nor ROLLBACK', async () => {
      const { knex, proxy } = await ledger.throughProxy();
      const { url, errors } = await serve(
        () => {
          throw Object.assign(new Error('mine'), { status: 418 });
        },
        { knex },
      );
      expect(await get(url)).toMatchObject({ status: 418 });
      expect(errors).toHaveLength(1);
      expect(proxy.connections()).toBe(0);
    });
  });

  // Scenario 3.
  describe('when the pool is exhausted', () => {
    it('still serves what needs no session', async () => {
      const folder = await mkdtemp(join(tmpdir(), 'laziness-'));
      await writeFile(join(folder, 'file.txt'), 'static');
      const knex = ledger.pool({ pool: { min: 0, max: 1 } });
      const taken = await knex.transaction();
      const app = express();
      app.use(sessionMiddleware(knex), express.static(folder));
      app.post(
        '/notes',
        route(async (req, res) => res.json(await req.session('notes').select())),
      );
      app.all('/notes', (_req, res) => void res.sendStatus(405));
      app.use(sessionErrorHandler());
      const { url } = await ledger.listen(app);

      expect(await get(`${url}/nothing`)).toMatchObject({ status: 404 });
      expect(await get(`${url}/notes`)).toMatchObject({ status: 405 });
      expect(await request(`${url}/notes`, { method: 'OPTIONS' })).toMatchObject({ status: expect.any(Number), complete: true });
      expect(await get(`${url}/file.txt`)).toMatchObject({ status: 200, body: 'static' });
      const waiting = request(`${url}/notes`, { method: 'POST' });
      await eventually(() => expect(poolUsage(knex)).toMatchObject({ used: 1, pendingAcquires: 1 }));
      expect(await get(`${url}/file.txt`)).toMatchObject({ status: 200 });

      await taken.rollback();

      expect(await waiting).toMatchObject({ status: 200, body: '[]' });
      await rm(folder, { recursive: true });
    });

    it('answers 503 ERR_SESSION_UNAVAILABLE when the pool gives up', async () => {
      const knex = ledger.pool({ pool: { min: 0, max: 1 }, acquireConnectionTimeout: 500 });
      const taken = await knex.transaction();
      const { url, errors } = await serve(async (req, res) => void res.json(await insert(req, 'a')), { knex });
      expect(await get(url)).toMatchObject({ status: 503, body: expect.stringContaining('ERR_SESSION_UNAVAILABLE') });
      expect(errors[0].cause).toMatchObject({ name: 'KnexTimeoutError' });
      await taken.rollback();
      expect(await get(url)).toMatchObject({ status: 200 });
    });
  });

  // Scenario 5.
  describe('when two first statements are issued at once', () => {
    it('begins once, on one connection', async () => {
      const { knex, proxy } = await ledger.throughProxy();
      const { url } = await serve(
        async (req, res) => {
          const pids = await Promise.all(
            [1, 2, 3].map(() => req.session.raw('SELECT pg_backend_pid() AS pid, pg_current_xact_id() AS id')),
          );
          res.json(new Set(pids.map(({ rows }) => JSON.stringify(rows))).size);
        },
        { knex },
      );
      expect(await get(url)).toMatchObject({ status: 200, body: '1' });
      expect(proxy.connections()).toBe(1);
      expect(controlOf(proxy)).toEqual(['BEGIN;', 'COMMIT;']);
    });
  });

  // Scenario 6.
  describe('when a middleware and the handler use the session', () => {
    it.each([
      [200, ['by handler', 'by middleware']],
      [500, []],
    ])('is one transaction: a %d decides for both', async (status, stored) => {
      const { knex, proxy } = await ledger.throughProxy();
      const { url } = await ledger.serve(
        flavour,
        (app) => {
          app.use(
            route(async (req, _res, next) => {
              await insert(req, 'by middleware');
              next();
            }),
          );
          app.get(
            '/',
            route(async (req, res) => {
              await insert(req, 'by handler');
              res.sendStatus(status);
            }),
          );
        },
        { knex },
      );
      expect(await get(url)).toMatchObject({ status });
      expect(await ledger.stored()).toEqual(stored);
      expect(controlOf(proxy)).toEqual(['BEGIN;', status === 200 ? 'COMMIT;' : 'ROLLBACK']);
    });
  });
});
