import express, { type RequestHandler } from 'express';
import { type Session, type SessionOptions, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import { testDatabase } from 'express-knex-session/testing';
import type { Knex } from 'knex';
import { get, listen, RawClient } from './support/http';
import { answerError, caught } from './support/knex';
import { failOnWarnings } from './support/warnings';
import { atRest, deferred, type Handler, useBench } from './support/wire';

failOnWarnings();
const bench = useBench(
  {},
  {
    commitAt: (req) => (req.get('commit-at') ?? 'head') as 'head',
    transactionTimeout: (req) => Number(req.get('time-limit') ?? 30_000),
  },
);
const failure = new RangeError('no');

let ran: unknown[];
beforeEach(() => {
  ran = [];
});

/** A middleware with options of its own. */
async function serve(knex: Knex, options: SessionOptions, handler: RequestHandler) {
  const sessions = sessionMiddleware(knex, options);
  const app = express().use(sessions).get('/', handler).use(sessionErrorHandler(), answerError);
  const server = await listen(app);
  return { ...server, sessions };
}

async function connect(handler: Handler, ...headers: string[]): Promise<RawClient> {
  const url = new URL(bench.route(handler));
  return (await RawClient.connect(Number(url.port))).get(url.pathname, ...headers);
}

describe('when the request has no transaction', () => {
  const options = { transaction: false } as const;

  it('calls them by what was done: statements have committed, whatever the response says', async () => {
    for (const [status, statement, expected] of [
      [200, true, 'afterCommit'],
      [200, false, 'afterCommit'],
      [400, true, 'afterCommit'],
      [400, false, 'afterRollback'],
    ] as const) {
      ran = [];
      const server = await serve(bench.knex, options, async (req, res) => {
        for (const kind of ['beforeCommit', 'afterCommit', 'afterRollback'] as const) req.session[kind](() => ran.push(kind));
        if (statement) await req.session.raw('select 1');
        res.status(status).end();
      });
      await get(server.url);
      await server.close();
      expect(ran).toEqual(status === 200 ? ['beforeCommit', expected] : [expected]);
    }
  });

  it('gives hooks none either, with and without a statement before', async () => {
    for (const statement of [true, false]) {
      const server = await serve(bench.knex, options, async (req, res) => {
        if (statement) await req.session.raw('select 1');
        req.session.afterCommit(async (session) => {
          await session('items').insert({ name: `statement ${statement}` });
          throw failure;
        });
        res.end();
      });
      await get(server.url);
      await server.close();
    }
    expect(await bench.stored()).toEqual(['statement true', 'statement false']);
  });
});

describe('when the client leaves, or time is up, while a beforeCommit hook is at work', () => {
  it.each<[string, (session: Session) => unknown]>([
    ['runs a statement', (session) => session.raw('select pg_sleep(60)')],
    ['runs a statement, and swallows its error', (session) => caught(session.raw('select pg_sleep(60)'))],
    ['hangs', () => new Promise(() => {})],
  ])('rolls back, and gives the connection back: it %s', async (_name, hang) => {
    for (const leaves of [true, false]) {
      const [inHook, rolledBack] = [deferred(), deferred()];
      const handler: Handler = async (req, res) => {
        await req.session('items').insert({ name: 'a' });
        req.session.beforeCommit((session) => [inHook.resolve(), hang(session)][1]);
        req.session.beforeCommit(() => ran.push('after it'));
        req.session.afterRollback(() => rolledBack.resolve());
        res.end();
      };
      const client = await connect(handler, `time-limit: ${leaves ? 30_000 : 300}`);
      await inHook.promise;
      if (leaves) await client.reset();
      else expect(await client.readUntil('\r\n\r\n')).toMatch(/^HTTP\/1.1 503 /);
      await rolledBack.promise;
      await bench.rest();
      await client.destroy();
    }
    expect([ran, await bench.stored()]).toEqual([[], []]);
  });

  it('calls afterRollback for a client that leaves before the response ends, though no statement ran', async () => {
    const [inHandler, rolledBack] = [deferred(), deferred()];
    const client = await connect((req) => {
      req.session.afterRollback(() => rolledBack.resolve());
      inHandler.resolve();
    });
    await inHandler.promise;
    await client.reset();
    await rolledBack.promise;
  });

  it('rolls back for a client that leaves during a beforeCommit hook that hangs, though no statement ran', async () => {
    const [inHook, rolledBack] = [deferred(), deferred()];
    const client = await connect((req, res) => {
      req.session.beforeCommit(() => [inHook.resolve(), new Promise(() => {})][1]);
      req.session.afterRollback(() => rolledBack.resolve());
      res.end();
    });
    await inHook.promise;
    await client.reset();
    await rolledBack.promise;
  });

  it('goes on with afterCommit hooks if it leaves while they run', async () => {
    const [inHook, left, done] = [deferred(), deferred(), deferred()];
    const client = await connect(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      res.once('close', left.resolve);
      req.session.afterCommit(() => [inHook.resolve(), left.promise][1]);
      req.session.afterCommit((session) => session('items').insert({ name: 'b' }));
      req.session.afterCommit(() => done.resolve());
      res.end();
    });
    await inHook.promise;
    await client.reset();
    await done.promise;
    expect(await bench.stored()).toEqual(['a', 'b']);
  });
});

describe('when the application shuts down while a hook works', () => {
  it('waits for its session, refuses new requests, and lets the hooks after it work', async () => {
    const [inHook, goOn] = [deferred(), deferred()];
    const server = await serve(bench.knex, {}, async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      req.session.afterCommit(async (session) => [await session('items').insert({ name: 'b' }), inHook.resolve(), await goOn.promise]);
      req.session.afterCommit((session) => session('items').insert({ name: 'c' }));
      res.status(201).end();
    });
    const answered = get(server.url);
    await inHook.promise;
    const drained = server.sessions.drain(5_000).then(() => ran.push('drained'));
    expect((await get(server.url)).status).toBe(503);
    ran.push('hook ends');
    goOn.resolve();
    await drained;
    expect((await answered).status).toBe(201);
    expect([ran, await bench.stored()]).toEqual([
      ['hook ends', 'drained'],
      ['a', 'b', 'c'],
    ]);
    await server.close();
  });

  it('ends its session when patience ends: the work stays, the hook is reported', async () => {
    const inHook = deferred();
    const reported: unknown[] = [];
    const server = await serve(bench.knex, { onError: (error) => void reported.push(error) }, async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      req.session.afterCommit((session) => {
        const sleeping = session.raw('select pg_sleep(60)').then(() => {});
        session.on('query', ({ sql }) => sql.includes('pg_sleep') && inHook.resolve());
        return sleeping;
      });
      res.status(201).end();
    });
    const answered = get(server.url);
    await inHook.promise;
    await server.sessions.drain(10);
    expect(server.sessions.stats()).toMatchObject({ open: 0, waiting: 0 });
    expect((await answered).status).toBe(201);
    expect(reported).toMatchObject([{ code: 'ERR_SESSION_UNAVAILABLE' }]);
    await server.close();
  });
});

describe('when bytes flow before COMMIT', () => {
  it("calls afterCommit before the response is complete: commitAt 'end'", async () => {
    const [inHook, goOn] = [deferred(), deferred()];
    const handler: Handler = async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      res.write('first');
      req.session.afterCommit(() => [inHook.resolve(), goOn.promise][1]);
      res.end('last');
    };
    const client = await connect(handler, 'commit-at: end');
    await client.readUntil('last');
    await inHook.promise;
    expect([await bench.stored(), client.received.includes('0\r\n\r\n')]).toEqual([['a'], false]);
    goOn.resolve();
    await client.readUntil('0\r\n\r\n');
    await client.destroy();
  });

  it("calls them after the response: commitAt 'finish'", async () => {
    for (const status of [200, 400]) {
      const hook = deferred();
      const handler: Handler = async (req, res) => {
        await req.session('items').insert({ name: `${status}` });
        for (const kind of ['beforeCommit', 'afterCommit', 'afterRollback'] as const) {
          req.session[kind](() => [ran.push(kind, res.writableFinished), kind !== 'beforeCommit' && hook.resolve()]);
        }
        res.status(status).end();
      };
      expect((await bench.answer(handler, { headers: { 'commit-at': 'finish' } })).status).toBe(status);
      await hook.promise;
      await atRest(bench.knex);
    }
    expect(ran).toEqual(['beforeCommit', true, 'afterCommit', true, 'afterRollback', true]);
  });
});

describe('when the application is tested in an outer transaction', () => {
  it('calls hooks as in production, at the simulated commit, and rolls their work back with the test (scenario 70)', async () => {
    const database = testDatabase(bench.knex);
    const server = await serve(database.knex, {}, async (req, res) => {
      const { name } = req.query as { name: string };
      await req.session('items').insert(name.split('').map((letter) => ({ name: letter })));
      req.session.beforeCommit((session) => session('items').insert({ name: `${name}!` }));
      for (const kind of ['afterCommit', 'afterRollback'] as const) {
        req.session[kind](async (session) => {
          ran.push(kind, await session('items').orderBy('id').pluck('name'));
          await session('items').insert({ name: kind });
        });
      }
      res.end();
    });

    await database.begin();
    expect((await get(`${server.url}?name=ab`)).status).toBe(200);
    expect((await get(`${server.url}?name=cc`)).status).toBe(500);
    expect(ran).toEqual(['afterCommit', ['a', 'b', 'ab!'], 'afterRollback', ['a', 'b', 'ab!', 'afterCommit']]);
    await database.rollback();
    await server.close();
    expect(await bench.stored()).toEqual([]);
  });
});
