import { writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import compression from 'compression';
import express, { type RequestHandler } from 'express';
import { type SessionOptions, sessionMiddleware, type TransactionMessage } from 'express-knex-session';
import { openSite } from './support/deadlines';
import { useEvents } from './support/events';
import { get } from './support/http';
import { type Handler, insert, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';
import { isSql } from './support/wire';

failOnWarnings();
const ledger = useLedger();
const events = useEvents();

const linger = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

interface Times {
  startedAt: number;
  openedAt: number;
  endedAt: number;
}

function timesOf({ startedAt, waitedMs = Number.NaN, heldMs = Number.NaN }: TransactionMessage): Times {
  const openedAt = startedAt + waitedMs;
  return { startedAt, openedAt, endedAt: openedAt + heldMs };
}

describe('waitedMs and heldMs', () => {
  it('tell the wait for the pool from the time with the connection', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 } });
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, req.path);
        await linger(50);
        res.end();
      },
      { knex },
    );
    const begun = performance.now();
    await Promise.all(['/a', '/b'].map((path) => get(site.url + path)));
    const took = performance.now() - begun;
    const [first, second] = (await events.settled(2)).map(timesOf);
    for (const { startedAt, openedAt, endedAt } of [first, second] as Times[]) {
      expect(startedAt).toBeGreaterThanOrEqual(begun);
      expect(endedAt - openedAt).toBeGreaterThanOrEqual(49);
      expect(endedAt).toBeLessThanOrEqual(begun + took);
    }
    // It has waited until the first has given the connection back.
    expect(second?.openedAt).toBeGreaterThanOrEqual(first?.endedAt as number);
  });

  it.each(['COMMIT;', 'ROLLBACK'])('count the time of %s', async (command) => {
    const { knex, proxy } = await ledger.throughProxy();
    proxy.onFrontend((message) => (isSql(message, command) ? linger(40).then(() => {}) : undefined));
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        res.sendStatus(command === 'ROLLBACK' ? 400 : 201);
      },
      { knex },
    );
    await site.get();
    const [settled] = await events.settled();
    expect(settled?.heldMs).toBeGreaterThanOrEqual(39);
    const settle = events.told.find(({ channel }) => channel === 'settle');
    expect(settle?.asTold.heldMs).toBeUndefined();
  });

  it('count no time before the first statement, and none after the end', async () => {
    const moments: number[] = [];
    const site = await openSite(ledger, async (req, res) => {
      void req.session('notes');
      await linger(20);
      moments.push(performance.now());
      await insert(req, 'a');
      await req.session.commit();
      moments.push(performance.now());
      await linger(20);
      res.end();
    });
    await site.get();
    const [settled] = (await events.settled()).map(timesOf);
    expect(settled?.startedAt).toBeGreaterThanOrEqual(moments[0] as number);
    expect(settled?.endedAt).toBeLessThanOrEqual(moments[1] as number);
  });
});

describe('statements and lastStatement', () => {
  const counted: [string, number, string, (req: Express.Request) => unknown, SessionOptions?][] = [
    ['none of BEGIN and COMMIT', 1, 'select * from "notes" where "id" = ?', ({ session }) => session('notes').where({ id: 'secret' })],
    ['a raw one, as it was written', 1, 'SELECT ?::text', ({ session }) => session.raw('SELECT ?::text', ['secret'])],
    ['one that fails', 1, 'SELECT 1/0', ({ session }) => session.raw('SELECT 1/0').catch(() => {})],
    ['a stream', 1, 'select * from "notes"', ({ session }) => session('notes').stream().toArray()],
    ['each of several', 3, 'SELECT 3', ({ session }) => Promise.all([1, 2, 3].map((n) => session.raw(`SELECT ${n}`)))],
    [
      'SAVEPOINT and its end, too',
      3,
      'RELEASE',
      ({ session }) => session.transaction((savepoint) => savepoint('notes').where({ id: 'secret' })),
    ],
    [
      'none of the settings that go with BEGIN',
      1,
      'SELECT 1',
      ({ session }) => session.raw('SELECT 1'),
      { settings: { 'app.tenant': 'secret' } },
    ],
    [
      'set() in the transaction',
      2,
      'SELECT set_config',
      ({ session }) => session.raw('SELECT 1').then(() => session.set({ 'app.a': 'secret' })),
    ],
    ['none that is refused', 1, 'SELECT 1', ({ session }) => session.raw('SELECT 1').then(() => session.raw('COMMIT').catch(() => {}))],
  ];
  it.each(counted)('count %s', async (_, statements, lastStatement, work, options = {}) => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await work(req);
        res.status(400).end();
      },
      options,
    );
    expect(await site.get()).toMatchObject({ status: 400 });
    const [settled] = await events.settled();
    expect(settled).toMatchObject({
      statements,
      lastStatement: expect.stringMatching(new RegExp(`^${lastStatement.replace(/[*?()]/g, '.')}`)),
    });
    expect(settled?.lastStatement).not.toContain('secret');
  });
});

describe('bytesHeld', () => {
  const file = join(tmpdir(), `events-${process.pid}.txt`);
  writeFileSync(file, 'x'.repeat(100_000));
  const held: [string, number, Handler, SessionOptions?][] = [
    ['res.json()', 11, (_req, res) => res.json({ ok: true })],
    ['text beyond ASCII', 6, (_req, res) => res.send('aé€')],
    ['no body', 0, (_req, res) => res.status(204).end()],
    ['res.end(callback)', 0, (_req, res) => res.end(() => {})],
    ['write, write, end', 8, (_req, res) => [res.write('ab'), res.write(Buffer.from('cd')), res.end('cdef')]],
    ['a chunk in another encoding', 2, (_req, res) => res.end('abcd', 'hex')],
    ['write with a callback', 3, (_req, res) => [res.write('abc', () => {}), res.end()]],
    ['a Uint8Array', 3, (_req, res) => res.end(new Uint8Array(3))],
    [
      'a pipe, which waits after its first chunk',
      10_000,
      (_req, res) => void Readable.from(['x'.repeat(10_000), 'y'.repeat(20_000)], { objectMode: false }).pipe(res),
    ],
    ['an error response', 3, (_req, res) => res.status(400).send('bad')],
    ["a stream that flows, with commitAt: 'end'", 0, (_req, res) => [res.write('ab'), res.write('cd'), res.end('ef')], { commitAt: 'end' }],
    [
      "the chunk that reaches the declared length, with commitAt: 'end'",
      2,
      (_req, res) => [res.set('Content-Length', '4').write('ab'), res.write('cd'), res.end()],
      { commitAt: 'end' },
    ],
    ["a body in one piece, with commitAt: 'end'", 11, (_req, res) => res.json({ ok: true }), { commitAt: 'end' }],
    ["nothing, with commitAt: 'finish'", 0, (_req, res) => res.json({ ok: true }), { commitAt: 'finish' }],
    ['nothing after commit()', 0, (req, res) => req.session.commit().then(() => res.json({ ok: true }))],
  ];
  it.each(held)('of %s: %i', async (_, bytes, respond, options = {}) => {
    const site = await openSite(
      ledger,
      async (req, res, next) => {
        await insert(req, 'a');
        await respond(req, res, next);
      },
      options,
    );
    expect(await site.get()).toMatchObject({ complete: true });
    expect(await events.settled()).toMatchObject([{ bytesHeld: bytes }]);
  });

  it('of what goes to a res.end() that was looked up before the first statement', async () => {
    const site = await openSite(ledger, async (req, res) => res.end(JSON.stringify(await req.session('notes'))));
    expect(await site.get()).toMatchObject({ body: '[]' });
    expect(await events.settled()).toMatchObject([{ bytesHeld: 2 }]);
  });

  it('of a file that is sent: what came before COMMIT was answered', async () => {
    const site = await openSite(ledger, async (req, res) => {
      await insert(req, 'a');
      res.sendFile(file);
    });
    expect((await site.get()).body).toHaveLength(100_000);
    const [settled] = await events.settled();
    expect(settled?.bytesHeld).toBeGreaterThan(0);
    expect(settled?.bytesHeld).toBeLessThanOrEqual(100_000);
  });

  it('of what is written while COMMIT is under way', async () => {
    const held = await ledger.holdCommits();
    const site = await openSite(ledger, async (req, res) => {
      await insert(req, 'a', 'wait');
      res.write('1234');
      await held.waiting();
      res.write('5678');
      res.end('9');
      await held.release();
    });
    expect(await site.get()).toMatchObject({ body: '123456789' });
    expect(await events.settled()).toMatchObject([{ bytesHeld: 9 }]);
  });

  const firstStatement: RequestHandler = async (req, _res, next) => {
    await req.session('notes');
    next();
  };
  const compress = compression({ threshold: 0 }) as unknown as RequestHandler;
  const sessions: RequestHandler = (req, res, next) => sessionMiddleware(ledger.knex)(req, res, next);
  it.each<[string, RequestHandler[], boolean]>([
    ['before the session', [compress, sessions], false],
    ['after the session', [sessions, compress], false],
    ['after the first statement', [sessions, firstStatement, compress], true],
  ])('with compression mounted %s: as it comes to the session', async (_, handlers, isCompressed) => {
    const body = 'x'.repeat(10_000);
    const handler: RequestHandler = async (req, res) => {
      await insert(req, 'a');
      res.send(body);
    };
    const { url } = await ledger.listen(express().use(...handlers, handler));
    expect(await get(url, { headers: { 'Accept-Encoding': 'gzip' } })).toMatchObject({ headers: { 'content-encoding': 'gzip' } });
    const [settled] = await events.settled();
    if (isCompressed) expect(settled?.bytesHeld).toBeLessThan(100);
    else expect(settled?.bytesHeld).toBe(body.length);
  });

  it('is the same for two sessions of one response', async () => {
    const site = await openSite(ledger, {
      routes(app) {
        app.use(sessionMiddleware(ledger.knex, { property: 'db' as never }));
        app.get('/', (async (req, res) => {
          await insert(req, 'a');
          await (req as any).db('notes').insert({ id: 'b' });
          res.send('12345');
        }) as RequestHandler);
      },
    });
    expect(await site.get()).toMatchObject({ body: '12345' });
    expect((await events.settled(2)).map(({ bytesHeld }) => bytesHeld)).toEqual([5, 5]);
  });
});
