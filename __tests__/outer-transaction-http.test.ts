import { once } from 'node:events';
import express from 'express';
import { getSession, type Session, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { get, type Listening, listen, post, RawClient } from './support/http';
import { answerError, caught, insert, Ledger, UNCHANGED } from './support/knex';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

// Scenarios 48 and 69: an app whose requests all run in one outer transaction, as in a test that rolls everything back.
failOnWarnings();
const ledger = Ledger.forTests();

const kinds: [string, (knex: Knex) => Promise<{ outer: Knex.Transaction; end(how: 'commit' | 'rollback'): Promise<unknown> }>][] = [
  [
    'a Knex.Transaction',
    async (knex) => {
      const outer = await knex.transaction();
      return { outer, end: async (how) => outer[how]() };
    },
  ],
  [
    'a session',
    async (knex) => {
      let end = (_how: 'commit' | 'rollback') => {};
      const how = new Promise<'commit' | 'rollback'>((resolve) => {
        end = resolve;
      });
      let ended: Promise<unknown> | undefined;
      const outer = await new Promise<Session>((resolve) => {
        ended = withSession(knex, async (session) => {
          resolve(session);
          await session[await how]();
        });
      }).then((session) => [session] as const);
      return {
        outer: outer[0],
        async end(how) {
          end(how);
          await caught(ended as Promise<unknown>);
        },
      };
    },
  ],
];

describe.each(kinds)('when every request runs in %s', (_name, open) => {
  let outer: Knex.Transaction;
  let end: (how: 'commit' | 'rollback') => Promise<unknown>;
  let server: Listening;
  let reached: (() => void) | undefined;
  const namesIn = (trx: Knex): PromiseLike<string[]> => trx('people').orderBy('id').pluck('name');

  beforeEach(async () => {
    ({ outer, end } = await open(ledger.knex));
    const app = express()
      .use(sessionMiddleware(outer))
      .get('/names', async (req, res) => void res.json(await namesIn(getSession(req))))
      .get('/health', (_req, res) => void res.end('well'))
      .post('/people/:name', async (req, res) => {
        await insert(getSession(req), req.params.name);
        res.status(Number(req.query['status'] ?? 201)).end();
      })
      .post('/swallow/:name', async (req, res) => {
        await insert(getSession(req), req.params.name);
        await insert(getSession(req), 'Ann').catch(() => {});
        res.status(201).end();
      })
      .post('/nested/:name', async (req, res) => {
        const session = getSession(req);
        await insert(session, req.params.name);
        await caught(session.transaction(async (inner) => Promise.reject(await insert(inner, 'x'))));
        await withSession(session, (deeper) => insert(deeper, `${req.params.name}!`));
        res.status(201).json(session.parentTransaction === outer);
      })
      .post('/hang/:name', async (req) => {
        await insert(getSession(req), req.params.name);
        reached?.();
      })
      .use(sessionErrorHandler(), answerError);
    server = await listen(app);
  });

  afterEach(async () => {
    await server.close();
    await end('rollback');
    expect(poolUsage(ledger.knex)).toMatchObject({ used: 0, pendingAcquires: 0 });
  });

  const names = async () => JSON.parse((await get(`${server.url}/names`)).body);
  const statusOf = async (path: string) => (await post(`${server.url}${path}`)).status;

  it('shows each what those before it have committed, and stores nothing until the outer one commits', async () => {
    expect(await statusOf('/people/x')).toBe(201);
    expect(await names()).toEqual([...UNCHANGED, 'x']);
    expect(await ledger.names()).toEqual(UNCHANGED);

    await end('commit');
    expect(await ledger.names()).toEqual([...UNCHANGED, 'x']);
  });

  it('leaves nothing when the outer one is rolled back', async () => {
    await statusOf('/people/x');
    await end('rollback');
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it('rolls back those that fail, and only those', async () => {
    expect(await statusOf('/people/a')).toBe(201);
    expect(await statusOf('/people/b?status=409')).toBe(409);
    expect(await statusOf('/people/Ann')).toBe(500);
    expect(await statusOf('/people/c')).toBe(201);
    expect(await names()).toEqual([...UNCHANGED, 'a', 'c']);
    expect(await namesIn(outer)).toEqual([...UNCHANGED, 'a', 'c']);
  });

  it('answers a swallowed error with a 500, and the next request is served', async () => {
    const answer = await post(`${server.url}/swallow/x`);
    expect([answer.status, JSON.parse(answer.body)]).toMatchObject([
      500,
      { code: 'ERR_TRANSACTION_ABORTED', cause: expect.stringContaining('people_name_unique') },
    ]);
    expect(await statusOf('/people/y')).toBe(201);
    expect(await names()).toEqual([...UNCHANGED, 'y']);
  });

  it('runs requests that come at once one after the other, and loses none', async () => {
    const paths = Array.from({ length: 12 }, (_, i) =>
      i % 3 === 2 ? `/people/n${i}?status=400` : i % 3 === 1 ? `/swallow/n${i}` : `/people/n${i}`,
    );
    const statuses = await Promise.all(paths.map(statusOf));

    expect(statuses).toEqual(paths.map((_, i) => [201, 500, 400][i % 3]));
    expect((await names()).sort()).toEqual([...UNCHANGED, 'n0', 'n3', 'n6', 'n9'].sort());
  });

  it('serves savepoints and sessions within a request', async () => {
    expect((await post(`${server.url}/nested/x`)).body).toBe('true');
    expect(await names()).toEqual([...UNCHANGED, 'x', 'x!']);
  });

  it('rolls back the request of a client that leaves, and serves the next', async () => {
    const client = await RawClient.connect(server.port);
    await new Promise<void>((resolve) => {
      reached = resolve;
      client.write('POST /hang/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n');
    });
    await client.reset();

    expect(await statusOf('/people/y')).toBe(201);
    expect(await names()).toEqual([...UNCHANGED, 'y']);
  });

  it('takes no connection from the pool', async () => {
    await outer('people').first();
    let requests = 0;
    ledger.knex.client.pool.on('acquireRequest', () => requests++);
    await Promise.all(['/people/x', '/swallow/y', '/people/z?status=404'].map(statusOf));
    ledger.knex.client.pool.removeAllListeners('acquireRequest');
    expect([requests, poolUsage(ledger.knex).used]).toEqual([0, 1]);
  });

  it('sends nothing for a request that runs no statement', async () => {
    const heard: string[] = [];
    outer.on('query', ({ sql }) => heard.push(sql));
    expect((await get(`${server.url}/health`)).body).toBe('well');
    outer.removeAllListeners('query');
    expect(heard).toEqual([]);
  });

  it('refuses requests by name when the outer one has ended, and serves those without statements', async () => {
    await end('commit');
    const answer = await get(`${server.url}/names`);
    expect([answer.status, JSON.parse(answer.body).code]).toEqual([500, 'ERR_SESSION_CLOSED']);
    expect((await get(`${server.url}/health`)).status).toBe(200);
  });
});

describe('when a client leaves while its request waits for the one before it', () => {
  it('is not served, and the one after it is', async () => {
    const outer = await ledger.knex.transaction();
    let release = () => {};
    const app = express()
      .use(sessionMiddleware(outer))
      .post('/slow', async (req, res) => {
        await insert(getSession(req), 'slow');
        server.server.emit('slow begun');
        await new Promise<void>((resolve) => {
          release = resolve;
        });
        res.end();
      })
      .post('/:name', async (req, res) => {
        const work = insert(getSession(req), req.params.name);
        server.server.emit('asked');
        res.once('close', () => server.server.emit('gone'));
        await work;
        res.end();
      })
      .use(sessionErrorHandler(), answerError);
    const server = await listen(app);

    const begun = once(server.server, 'slow begun');
    const slow = post(`${server.url}/slow`);
    await begun;
    const asked = once(server.server, 'asked');
    const client = await RawClient.connect(server.port);
    client.write('POST /left HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n');
    await asked;
    const gone = once(server.server, 'gone');
    await client.reset();
    await gone;
    release();

    expect((await slow).status).toBe(200);
    expect((await post(`${server.url}/after`)).status).toBe(200);
    expect(await outer('people').orderBy('id').pluck('name')).toEqual([...UNCHANGED, 'slow', 'after']);
    await server.close();
    await outer.rollback();
    await eventually(() => expect(poolUsage(ledger.knex)).toMatchObject({ used: 0 }));
  });
});
