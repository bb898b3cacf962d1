import express, { type RequestHandler } from 'express';
import { type Session, type SessionOptions, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { get, listen, RawClient } from './support/http';
import { answerError, caught } from './support/knex';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred, type Handler, isSql, useBench } from './support/wire';

failOnWarnings();
const bench = useBench(
  {},
  { commitAt: (req) => (req.get('commit-at') ?? 'head') as 'head', transactionTimeout: (req) => Number(req.get('time-limit') ?? 30_000) },
);
const insert = (session: Knex, name: string) => session('items').insert({ name });

async function serve(knex: Knex, options: SessionOptions, handler: RequestHandler) {
  const sessions = sessionMiddleware(knex, options);
  const server = await listen(express().use(sessions).get('/', handler).use(sessionErrorHandler(), answerError));
  return { ...server, sessions };
}

describe('when 20 requests wait for something slow in their middle, on a pool of 2', () => {
  /** Serves 20 requests that wait, after `pause`, until all of them have come so far. */
  async function serveTwenty(acquireTimeout: number, pause: (session: Session) => unknown) {
    const knex = bench.database.knex({ pool: { min: 0, max: 2 } });
    const [allThere, someRefused] = [deferred(), deferred()];
    let there = 0;
    const server = await serve(knex, { acquireTimeout }, async (req, res) => {
      const { name } = req.query as { name: string };
      await insert(req.session, `${name} ordered`).catch((error) => {
        someRefused.resolve();
        throw error;
      });
      await pause(req.session);
      if (++there === 20) allThere.resolve();
      await Promise.race([allThere.promise, someRefused.promise]);
      await insert(req.session, `${name} paid`);
      res.status(201).end();
    });
    const names = Array.from({ length: 20 }, (_, i) => `${i}`);
    const answers = await Promise.all(names.map((name) => get(`${server.url}?name=${name}`)));
    await server.close();
    return answers.map(({ status }) => status);
  }

  it('serves them all at once, if each has its checkpoint before', async () => {
    expect(await serveTwenty(5_000, (session) => session.checkpoint())).toEqual(Array(20).fill(201));
    expect(await bench.stored()).toHaveLength(40);
  });

  it('refuses some of them without', async () => {
    expect(await serveTwenty(200, () => {})).toContain(503);
  });
});

describe('when the time between two parts is long', () => {
  it('does not count it, and none of its statements waits for a connection that is held', async () => {
    const handler: Handler = async (req, res) => {
      await insert(req.session, 'a');
      await req.session.checkpoint();
      // Longer than transactionTimeout.
      await bench.database.admin.raw('select pg_sleep(0.4)');
      await insert(req.session, 'b');
      res.status(201).end();
    };
    const answer = await bench.answer(handler, { headers: { 'time-limit': '250' } });
    expect([answer.status, await bench.stored()]).toEqual([201, ['a', 'b']]);
  });

  it('bounds the second part as the first', async () => {
    const handler: Handler = async (req) => {
      await insert(req.session, 'a');
      await req.session.checkpoint();
      await insert(req.session, 'b');
      await new Promise(() => {});
    };
    const answer = await bench.answer(handler, { headers: { 'time-limit': '250' } });
    expect([answer.status, JSON.parse(answer.body).code, await bench.stored()]).toEqual([503, 'ERR_SESSION_TIMEOUT', ['a']]);
  });
});

describe('when the client leaves', () => {
  async function leave(during: 'COMMIT' | 'the call' | 'the second part') {
    const [mayLeave, left, done] = [deferred(), deferred(), deferred<unknown[]>()];
    const url = new URL(
      bench.route(async (req, res) => {
        const { signal } = req.session;
        const aborted = new Promise<void>((resolve) => signal.addEventListener('abort', () => resolve(), { once: true }));
        res.once('close', left.resolve);
        await insert(req.session, 'a');
        if (during === 'COMMIT') {
          bench.proxy.onFrontend((message) => {
            if (!isSql(message, 'COMMIT;')) return undefined;
            mayLeave.resolve();
            return left.promise;
          });
        }
        await req.session.checkpoint();
        if (during === 'the second part') await insert(req.session, 'b');
        mayLeave.resolve();
        await aborted;
        done.resolve([signal === req.session.signal, signal.reason.code, (await caught(insert(req.session, 'late'))).code]);
        res.end();
      }),
    );
    const client = await RawClient.connect(Number(url.port));
    client.get(url.pathname);
    await mayLeave.promise;
    await client.reset();
    return done.promise;
  }

  it.each(['COMMIT', 'the call', 'the second part'] as const)(
    'aborts the same signal during %s, and keeps the first part',
    async (during) => {
      expect(await leave(during)).toEqual([true, 'ERR_SESSION_CLOSED', 'ERR_SESSION_CLOSED']);
      await bench.rest();
      expect(await bench.stored()).toEqual(['a']);
    },
  );
});

describe('when bytes flow between the parts', () => {
  it("commits each at its time: commitAt 'end'", async () => {
    const url = new URL(
      bench.route(async (req, res) => {
        for (const name of ['a', 'b', 'c']) {
          await insert(req.session, name);
          if (name !== 'c') await req.session.checkpoint();
          res.write(`${name}:${await bench.stored()};`);
        }
        res.end();
      }),
    );
    const client = await RawClient.connect(Number(url.port));
    client.get(url.pathname, 'Commit-At: end', 'Connection: close');
    await client.closed;
    expect(client.received).toMatch(/a:a;.*b:a,b;.*c:a,b;/s);
    expect(client.received).toContain('\r\n0\r\n\r\n');
    expect(await bench.stored()).toEqual(['a', 'b', 'c']);
  });

  it('cuts the connection if the last part fails, and keeps the first', async () => {
    const answer = await bench.answer(
      async (req, res) => {
        await insert(req.session, 'a');
        await req.session.checkpoint();
        res.write('first');
        await insert(req.session, 'a');
        res.end();
      },
      { headers: { 'commit-at': 'end' } },
    );
    expect([answer.complete, await bench.stored()]).toEqual([false, ['a']]);
    expect(bench.reported).toMatchObject([{ code: '23505' }]);
  });
});

describe('when the sessions are counted', () => {
  it.each([false, true])('counts each part, and drain() ends: readOnly %s', async (readOnly) => {
    const { promise, resolve } = deferred<unknown>();
    const server = await serve(bench.knex, { readOnly }, async (req, res) => {
      await req.session.raw('select 1');
      await req.session.checkpoint();
      resolve(server.sessions.stats());
      await req.session.raw('select 1');
      res.end();
    });
    await get(server.url);
    await server.sessions.drain(5_000);
    expect(server.sessions.stats()).toEqual({ open: 0, waiting: 0, committed: 2, rolledBack: 0, unknown: 0 });
    if (!readOnly) expect(await promise).toMatchObject({ open: 0, waiting: 0, committed: 1 });
    await server.close();
  });

  it('refuses the next part of a request while the application shuts down, and keeps the first', async () => {
    const server = await serve(bench.knex, {}, async (req, res) => {
      await insert(req.session, 'a');
      await req.session.checkpoint();
      await server.sessions.drain(5_000);
      await insert(req.session, 'b');
      res.end();
    });
    expect((await get(server.url)).status).toBe(503);
    await server.close();
    expect([await bench.stored(), poolUsage(bench.knex).used]).toEqual([['a'], 0]);
  });
});

describe('when there is no transaction', () => {
  it('commits nothing, and runs the hooks so far', async () => {
    const ran: string[] = [];
    const server = await serve(bench.knex, { transaction: false }, async (req, res) => {
      await insert(req.session, 'a');
      req.session.afterCommit(() => ran.push('hook'));
      await req.session.checkpoint();
      ran.push('checkpoint');
      await insert(req.session, 'b');
      res.end();
    });
    expect((await get(server.url)).status).toBe(200);
    await server.close();
    expect([ran, bench.proxy.sql().filter((sql) => /BEGIN|COMMIT/.test(sql))]).toEqual([['hook', 'checkpoint'], []]);
    expect(await bench.stored()).toEqual(['a', 'b']);
  });
});
