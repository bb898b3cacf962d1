import { once } from 'node:events';
import express, { type RequestHandler } from 'express';
import { currentSession, type Session, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { get, listen } from './support/http';
import { answerError, caught, Ledger } from './support/knex';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const ledger = Ledger.forTests();

/** The code of what currentSession() throws, or whether it is this one. */
function isCurrent(session: Session): boolean | string {
  try {
    return currentSession() === session;
  } catch (error) {
    return (error as { code: string }).code;
  }
}

async function serve(handler: RequestHandler, knex: Knex) {
  const app = express().use(sessionMiddleware(knex, { context: true }));
  return listen(app.use(handler).use(sessionErrorHandler(), answerError));
}

describe('when the driver calls back on a connection that another request has opened (hazard 20)', () => {
  /** On a pool of one: the first request opens the connection, the second one uses it while the first is still there. */
  async function onForeignConnection(look: (req: express.Request, seen: unknown[], first: Session) => unknown) {
    const knex = ledger.connect({ pool: { min: 0, max: 1 } });
    const [opened, goOn] = [deferred<Session>(), deferred()];
    const server = await serve(async (req, res) => {
      if (req.path === '/first') {
        await req.session.raw('select 1');
        await req.session.checkpoint();
        opened.resolve(req.session);
        await goOn.promise;
        res.json(isCurrent(req.session));
      } else {
        const seen: unknown[] = [];
        await look(req, seen, await opened.promise);
        res.json(seen);
      }
    }, knex);
    const first = get(`${server.url}/first`);
    await opened.promise;
    const second = await get(`${server.url}/second`);
    goOn.resolve();
    expect((await first).body).toBe('true');
    await server.close();
    return JSON.parse(second.body);
  }

  it("calls listeners of a session's stream in the request that reads it", async () => {
    const seen = await onForeignConnection(async (req, seen) => {
      const look = () => seen.push(isCurrent(req.session));
      const stream = req.session('people').stream();
      await once(stream.on('data', look).on('end', look).on('close', look), 'close');
    });
    expect(seen).toEqual([true, true, true, true, true]);
  });

  it('calls raw driver callbacks in nobody’s name: never in that of the request which opened the connection', async () => {
    const seen = await onForeignConnection(async (req, seen, first) => {
      await req.session.raw('select 1');
      const [{ resource }] = req.session.client.pool.used;
      const done = deferred();
      resource.query('select 1', () => {
        seen.push(isCurrent(first), isCurrent(req.session));
        done.resolve();
      });
      await done.promise;
      seen.push(isCurrent(req.session));
    });
    expect(seen).toEqual(['ERR_SESSION_MISSING', 'ERR_SESSION_MISSING', true]);
  });

  it('does so too on a connection that the pool has opened as another request gave a dead one back', async () => {
    const knex = ledger.connect({ pool: { min: 0, max: 1 }, log: { warn: () => {}, error: () => {} } });
    const [hasOne, mayDie, mayEnd] = [deferred<Session>(), deferred(), deferred()];
    const server = await serve(async (req, res) => {
      const pid = (await req.session.raw('select pg_backend_pid() as pid')).rows[0].pid;
      if (req.path === '/first') {
        hasOne.resolve(req.session);
        await mayDie.promise;
        await ledger.admin.raw('select pg_terminate_backend(?, 5000)', [pid]);
        await caught(req.session.rollback());
        await mayEnd.promise;
        res.json([]);
      } else {
        const first = await hasOne.promise;
        const [{ resource }] = knex.client.pool.used;
        await new Promise((done) => resource.query('select 1', () => done(res.json(isCurrent(first)))));
      }
    }, knex);
    const first = get(`${server.url}/first`);
    await hasOne.promise;
    const second = get(`${server.url}/second`);
    await eventually(() => expect(poolUsage(knex).pendingAcquires).toBe(1));
    mayDie.resolve();
    expect((await second).body).toBe('"ERR_SESSION_MISSING"');
    mayEnd.resolve();
    await first;
    await server.close();
  });
});
