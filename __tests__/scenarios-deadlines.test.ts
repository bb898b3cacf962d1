import { setTimeout as delay } from 'node:timers/promises';
import type { Express } from 'express';
import { deferred } from './support/gated-app';
import { get, keepAliveAgent, RawClient } from './support/http';
import { waysToLeave } from './support/leaving';
import { flavours, type Handler, insert, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

const never: Handler = () => new Promise(() => {});

describe.each(flavours)('on $version', (flavour) => {
  const serve = ledger.serving(flavour);

  // Scenario 7.
  describe('when no connection is to be had within the deadline', () => {
    it('answers 503 to all who wait, and a connection that comes late is given back at once', async () => {
      const knex = ledger.pool({ pool: { min: 0, max: 1 } });
      const { url, errors } = await serve(
        async (req, res) => {
          await insert(req, req.path);
          res.sendStatus(201);
        },
        { knex, acquireTimeout: 100 },
      );
      const taken = await knex.client.acquireConnection();
      const answers = await Promise.all(['a', 'b', 'c'].map((id) => get(`${url}/${id}`)));
      expect(answers.map(({ status }) => status)).toEqual([503, 503, 503]);
      expect(errors).toHaveLength(3);
      for (const error of errors) {
        expect(error).toMatchObject({ code: 'ERR_SESSION_UNAVAILABLE', cause: { message: expect.stringContaining('acquireTimeout') } });
      }
      // The pool has not heard that nobody waits any more.
      await knex.client.releaseConnection(taken);
      await eventually(() => expect(poolUsage(knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 }));
      expect(await get(`${url}/next`)).toMatchObject({ status: 201 });
      expect(await ledger.stored()).toEqual(['/next']);
    });

    it('gives it back too if it was on its way to the server', async () => {
      const { knex, proxy } = await ledger.throughProxy({ pool: { min: 0, max: 1 } });
      const { url } = await serve(async (req) => void (await insert(req, 'a')), { knex, acquireTimeout: 100 });
      proxy.pause();
      expect(await get(url)).toMatchObject({ status: 503 });
      proxy.resume();
      await eventually(() => expect(poolUsage(knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 }));
      expect(proxy.sql()).not.toContain('BEGIN;');
    });
  });

  // Scenario 29.
  describe.each(waysToLeave)('when clients disconnect in a query (%s)', (_, leave) => {
    it('cancels and rolls back within a second, and hits none of those who get their connections next', async () => {
      const { port, url, errors } = await serve(async (req, res) => {
        await insert(req, req.path);
        if (req.path.startsWith('/gone')) await req.session.raw('SELECT pg_sleep(30)');
        else await req.session.raw('SELECT pg_sleep(0.005)');
        res.sendStatus(201);
      });
      for (const round of ['1', '2', '3']) {
        const clients = await Promise.all(Array.from({ length: 5 }, () => RawClient.connect(port)));
        for (const [i, client] of clients.entries()) client.get(`/gone${round}${i}`);
        await eventually(async () => expect(await sleepers()).toBe(5));
        // Every connection of the pool is in use: these wait for one that comes back from a cancelled statement.
        const next = Promise.all(Array.from({ length: 10 }, (_unused, i) => get(`${url}/next${round}${i}`)));
        const left = performance.now();
        await Promise.all(clients.map(leave));
        expect((await next).map(({ status }) => status)).toEqual(Array(10).fill(201));
        expect(performance.now() - left).toBeLessThan(1_000);
      }
      await ledger.isClean();
      expect((await ledger.stored()).filter((id) => !id.startsWith('/next'))).toEqual([]);
      expect(await ledger.stored()).toHaveLength(30);
      expect(errors.map(({ code, cause }) => `${code} ${cause?.code}`)).toEqual(Array(15).fill('ERR_SESSION_CLOSED 57014'));
    });
  });

  // Scenario 37.
  describe('when a transaction stays open too long', () => {
    it('rolls back, answers 503, and tells a handler that comes back to it', async () => {
      const [wake, told] = [deferred(), deferred<unknown>()];
      const { url, errors } = await serve(
        async (req, res) => {
          await insert(req, 'a');
          await wake.promise;
          await insert(req, 'b').then(told.resolve, told.resolve);
          res.json('late');
        },
        { transactionTimeout: 100 },
      );
      const agent = keepAliveAgent();
      // Whatever the handler does later, no next request is on that connection.
      expect(await get(url, { agent })).toMatchObject({ status: 503, complete: true, headers: { connection: 'close' } });
      agent.destroy();
      await ledger.isClean();
      wake.resolve();
      expect(await told.promise).toMatchObject({ code: 'ERR_SESSION_CLOSED', cause: { code: 'ERR_SESSION_TIMEOUT' } });
      expect(errors.map(({ code }) => code)).toEqual(['ERR_SESSION_TIMEOUT']);
      expect(await ledger.stored()).toEqual([]);
    });

    it('counts from the connection, not from the request, and per request if the option says so', async () => {
      const { url } = await serve(
        async (req, res) => {
          await delay(250);
          await insert(req, req.path);
          if (req.path === '/long') await delay(250);
          res.sendStatus(201);
        },
        { transactionTimeout: (req) => (req.path === '/long' ? 0 : 200) },
      );
      const answers = await Promise.all([get(`${url}/short`), get(`${url}/long`)]);
      expect(answers.map(({ status }) => status)).toEqual([201, 201]);
      expect(await ledger.stored()).toEqual(['/long', '/short']);
    });

    it('cuts a response whose bytes were sent', async () => {
      const reported: unknown[] = [];
      const { url, errors } = await serve(
        async (req, res, next) => {
          await insert(req, 'a');
          res.write('begun');
          return never(req, res, next);
        },
        { transactionTimeout: 100, commitAt: 'end', onError: (error) => reported.push(error) },
      );
      expect(await get(url)).toMatchObject({ status: 200, body: 'begun', complete: false });
      await ledger.isClean();
      expect(await ledger.stored()).toEqual([]);
      // There is no response left that an error handler could send.
      expect(errors).toEqual([]);
      expect(reported).toMatchObject([{ code: 'ERR_SESSION_TIMEOUT' }]);
    });
  });

  // Scenario 80, hazard 37.
  describe("when the app's own response timeout answers while the handler still runs", () => {
    const lateEnds: [string, Handler][] = [
      ['throws', () => Promise.reject(new Error('late'))],
      ['answers', (_req, res) => void res.json('late')],
      ['runs a statement', async (req) => void (await insert(req, 'late'))],
    ];
    it.each(lateEnds)('serves the next request on that connection when the handler %s at last', async (_, end) => {
      const goOn = deferred();
      const timeout: Handler = (_req, _res, next) => {
        setTimeout(() => next(Object.assign(new Error('too slow'), { status: 503 })), 50);
        next();
      };
      const slow: Handler = async (req, res, next) => {
        await insert(req, 'slow');
        await goOn.promise;
        await end(req, res, next);
      };
      const quick: Handler = async (req, res) => {
        await insert(req, 'next');
        res.json('ok');
      };
      const { url, errors, server } = await ledger.serve(flavour, (app: Express) => {
        app.get('/slow', timeout, flavour.route(slow));
        app.get('/next', flavour.route(quick));
      });
      let connections = 0;
      server.on('connection', () => connections++);
      const agent = keepAliveAgent();
      expect(await get(`${url}/slow`, { agent })).toMatchObject({ status: 503, complete: true });
      const next = get(`${url}/next`, { agent });
      goOn.resolve();
      expect(await next).toMatchObject({ status: 200, complete: true });
      agent.destroy();
      expect(connections).toBe(1);
      expect(errors.map(({ message }) => message)).toEqual(['too slow']);
      expect(await ledger.stored()).toEqual(['next']);
    });
  });
});

async function sleepers(): Promise<number> {
  const rows = await ledger.database.admin('pg_stat_activity').whereRaw("datname = current_database() AND wait_event = 'PgSleep'");
  return rows.length;
}
