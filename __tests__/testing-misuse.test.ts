import { withSession } from 'express-knex-session';
import { type TestDatabase as Kit, testDatabase } from 'express-knex-session/testing';
import request from 'supertest';
import { type Answer, caught, type Gate, gate, type Handler, useTestedApp } from './support/tested-app';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const tested = useTestedApp({ byHand: true, waitTimeout: 100 });

/** All that a rollback() says; nothing, if it succeeds. */
async function complaints(kit: Kit = tested.kit): Promise<string[]> {
  const error = await caught(kit.rollback());
  if (error === 'no error') return [];
  return (error.errors ?? [error]).map(({ code, message }: { code: string; message: string }) => `${code} ${message}`);
}
const inTest = (work: () => Promise<void>) => async () => {
  await tested.kit.begin();
  await work();
};
const send = (handler: Handler, path = '/', method: 'get' | 'post' = 'get') => request(tested.app(handler))[method](path);

describe('when requests are sent at once', () => {
  it(
    'runs one after the other, each with its own outcome',
    inTest(async () => {
      const handler: Handler = async (req, res) => {
        const place = Number(req.path.slice(1));
        const before = await req.session('items').pluck('place');
        await req.session('items').insert({ name: `n${place}`, place });
        await new Promise(setImmediate);
        const after = await req.session('items').pluck('place');
        expect(after.toSorted()).toEqual([...before, place].toSorted());
        if (place % 3 === 1) throw new RangeError('no');
        if (place % 3 === 2) await req.session('items').insert({ name: `n${place}` });
        res.sendStatus(201);
      };
      const app = tested.app(handler);
      const sent = Array.from({ length: 10 }, (_, i) => request(app).post(`/${i}`));
      const own = [
        tested.knex('items').insert({ name: 'of the test' }),
        tested
          .knex('items')
          .insert({ name: 'bad' })
          .catch(() => {}),
      ];
      const answers = await Promise.all(sent);
      await Promise.all(own);
      expect(answers.map(({ status, body }) => body.constraint ?? status)).toEqual(
        [0, 1, 2, 0, 1, 2, 0, 1, 2, 0].map((i) => [201, 500, 'late'][i]),
      );
      expect(await tested.names()).toEqual(['n0', 'n3', 'n6', 'n9', 'of the test']);
      expect(await complaints()).toEqual([]);
    }),
  );
});

describe('when one waits for another that waits for it', () => {
  it(
    'fails a request that another one sends while its session is open, and says so at rollback()',
    inTest(async () => {
      let inner: Answer | undefined;
      const app = tested.app(async (req, res) => {
        await req.session('items').insert({ name: req.path });
        if (req.path === '/outer') inner = await request(app).post('/inner');
        res.end();
      });
      await request(app).get('/outer?token=secret').expect(200);
      expect(inner).toMatchObject({ status: 503, body: { code: 'ERR_SESSION_UNAVAILABLE', cause: 'ERR_TEST_BLOCKED' } });
      expect(await tested.names()).toEqual(['/outer']);
      expect(await complaints()).toEqual([
        expect.stringMatching(/^ERR_TEST_BLOCKED POST \/inner has waited .* transaction of GET \/outer, /),
      ]);
    }),
  );

  it.each<[string, Handler]>([
    ['a root statement', () => tested.knex('items').insert({ name: 'x' })],
    ['knex.transaction()', () => tested.knex.transaction((trx) => trx('items').insert({ name: 'x' }))],
    ['withSession()', () => withSession(tested.knex, (session) => session('items').insert({ name: 'x' }))],
    ['a root stream', async () => await tested.knex('items').stream().toArray()],
  ])('fails %s in a request that holds a session, and says so at rollback(), even if the app has swallowed it', async (_, work) => {
    await tested.kit.begin();
    let error: any;
    const handler: Handler = async (req, res, next) => {
      await req.session('items').insert({ name: 'a' });
      error = await caught(Promise.resolve(work(req, res, next)));
      res.end();
    };
    await send(handler, '/holds').expect(200);
    expect([error.code, error.cause?.code]).toContain('ERR_TEST_BLOCKED');
    expect(await tested.names()).toEqual(['a']);
    expect(await complaints()).toEqual([
      expect.stringMatching(/^ERR_TEST_BLOCKED GET \/holds has waited .* another transaction of its own/),
    ]);
  });

  it(
    'lets them run when the session has ended before',
    inTest(async () => {
      const handler: Handler = async (req, res) => {
        await req.session('items').insert({ name: 'a' });
        await req.session.commit();
        await tested.knex('items').insert({ name: 'b' });
        res.end();
      };
      await send(handler).expect(200);
      expect(await tested.names()).toEqual(['a', 'b']);
      expect(await complaints()).toEqual([]);
    }),
  );

  const select: Handler = async (req, res) => res.json(await req.session('items').pluck('name'));

  it(
    'fails a request that is sent while the test has a transaction open',
    inTest(async () => {
      await tested.knex.transaction(async (trx) => {
        await trx('items').insert({ name: 'a' });
        await send(select, '/waits').expect(503);
      });
      expect(await complaints()).toEqual([
        expect.stringMatching(/^ERR_TEST_BLOCKED GET \/waits has waited .* the transaction of the test/),
      ]);
    }),
  );

  it(
    'fails a request that is sent while the test reads a stream, and a root statement while a request does',
    inTest(async () => {
      await tested.knex.raw("INSERT INTO items (name) SELECT 'n' || i FROM generate_series(1, 200) i");
      for await (const _ of tested.knex('items').stream()) {
        await send(select, '/waits').expect(503);
        break;
      }
      const reads: Handler = async (req, res) => {
        for await (const { id } of req.session('items').stream()) await tested.knex('items').where({ id }).del();
        res.end();
      };
      expect((await send(reads, '/reads')).body).toMatchObject({ code: 'ERR_TEST_BLOCKED' });
      expect(await tested.names()).toHaveLength(200);
      expect(await complaints()).toEqual([
        expect.stringMatching(/GET \/waits has waited/),
        expect.stringMatching(/GET \/reads has waited/),
      ]);
    }),
  );
});

describe('when a transaction asks for what cannot be had', () => {
  const isolated =
    (isolationLevel: 'serializable' | 'read committed'): Handler =>
    async (_req, res) => {
      await tested.knex.transaction((trx) => trx('items').insert({ name: isolationLevel }), { isolationLevel });
      res.end();
    };

  it(
    'refuses another isolation level than that of the test, and takes the same',
    inTest(async () => {
      expect((await send(isolated('serializable'), '/other')).body).toMatchObject({ code: 'ERR_TEST_UNSUPPORTED' });
      await send(isolated('read committed')).expect(200);
      expect(await tested.names()).toEqual(['read committed']);
      expect(await complaints()).toEqual([expect.stringMatching(/^ERR_TEST_UNSUPPORTED .*'serializable'.*'read committed'/)]);
    }),
  );

  it('runs the tests at the level that it was given', async () => {
    const kit = testDatabase(tested.original, { isolationLevel: 'serializable' });
    await kit.begin();
    const level = await kit.knex.transaction((trx) => trx.raw('SHOW transaction_isolation'), { isolationLevel: 'serializable' });
    expect(level.rows).toEqual([{ transaction_isolation: 'serializable' }]);
    const other = kit.knex.transaction((trx) => trx('items'), { isolationLevel: 'repeatable read' });
    await expect(other).rejects.toMatchObject({ code: 'ERR_TEST_UNSUPPORTED' });
    expect(await complaints(kit)).toEqual([]);
    await kit.knex.destroy();
  });

  it.each([
    "BEGIN; INSERT INTO items (name) VALUES ('x'); COMMIT",
    "INSERT INTO items (name) VALUES ('x'); COMMIT; SELECT 1",
    'SELECT 1; ROLLBACK',
    'COMMIT AND CHAIN',
    "PREPARE TRANSACTION 'x'",
    "/* x */ COMMIT; INSERT INTO items (name) VALUES ('x')",
  ])('refuses the text %s, and the test goes on', async (sql) => {
    await tested.kit.begin();
    await tested.knex('items').insert({ name: 'a' });
    const raw: Handler = async (_req, res) => res.json([await tested.knex.raw(sql)].length);
    expect((await send(raw)).body).toMatchObject({ code: 'ERR_TEST_UNSUPPORTED' });
    await expect(tested.knex.transaction((trx) => trx.raw(sql))).rejects.toMatchObject({ code: 'ERR_TEST_UNSUPPORTED' });
    expect(await tested.names()).toEqual(['a']);
    expect(await complaints()).toEqual([expect.stringMatching(/^ERR_TEST_UNSUPPORTED /)]);
  });
});

describe('when something is left at the end of a test', () => {
  const ways: [string, (req: Parameters<Handler>[0]) => Promise<unknown>, string[]][] = [
    ['has no transaction', async () => {}, []],
    ['has a session', (req) => req.session('items').insert({ name: 'lost' }), []],
    ['has a transaction of its own', async () => (await tested.knex.transaction())('items').insert({ name: 'lost' }), []],
  ];
  it.each(ways)('names a request that is still running, which %s, and the next test has nothing of it', async (_, begins) => {
    await tested.kit.begin();
    const [reached, next]: Gate[] = [gate(), gate()] as [Gate, Gate];
    const told: any[] = [];
    const over = gate();
    const handler: Handler = async (req, res) => {
      await begins(req);
      reached.open();
      await next.opened;
      const insert = { name: 'late' };
      told.push(await caught(req.session('items').insert(insert)), await caught(tested.knex('items').insert(insert)));
      told.push(await caught(tested.knex.transaction((trx) => trx('items').insert(insert))));
      told.push(await caught(withSession(tested.knex, (session) => session('items').insert(insert))));
      res.end();
      over.open();
    };
    const answer = send(handler, '/slow/1?secret=1', 'post')
      .send({ some: 'x'.repeat(100_000) })
      .then();
    await reached.opened;
    expect(await complaints()).toEqual(['ERR_TEST_LEFT_OPEN The test has ended while POST /slow/1 was still running. Await its response.']);

    await tested.kit.begin();
    next.open();
    await over.opened;
    expect(told.map((error) => error.cause?.code ?? error.code)).toEqual(Array(4).fill('ERR_TEST_NOT_RUNNING'));
    expect(await tested.names()).toEqual([]);
    await answer;
    expect(await complaints()).toEqual([]);
  });

  it(
    'cancels what runs for a request, and what waits behind it',
    inTest(async () => {
      const sleeps: Handler = async (req) => req.session.raw('SELECT pg_sleep(60)');
      const slow = send(sleeps, '/sleeps').then();
      await tested.isOnServer('SELECT pg_sleep');
      const waits = send((req) => req.session('items'), '/waits').then();
      const own = caught(tested.knex('items'));
      await new Promise(setImmediate);
      const all = await complaints();
      expect(all).toContainEqual(expect.stringContaining('GET /sleeps was still running'));
      expect((await slow).body.code).toMatch(/ERR_/);
      expect(await own).toMatchObject({ code: 'ERR_TEST_NOT_RUNNING' });
      expect((await waits).status).toBeGreaterThanOrEqual(500);
      expect(all.join()).not.toContain('pg_sleep');
    }),
  );

  it(
    'runs nothing of what waits, as soon as the transaction in front is gone',
    inTest(async () => {
      // Inside of another test, that goes on.
      await tested.kit.begin();
      const [reached, end] = [gate(), gate()];
      const holding: Handler = async (req, res) => {
        await req.session('items');
        reached.open();
        await end.opened;
        res.end();
      };
      const holds = send(holding, '/holds').then();
      await reached.opened;
      const waiting = [tested.knex.raw('SELECT pg_sleep(60)'), tested.knex.transaction((trx) => trx.raw('SELECT pg_sleep(60)'))];
      const told = Promise.all(waiting.map(caught));
      const all = await complaints();
      expect(all).toEqual([expect.stringContaining('GET /holds was still running')]);
      for (const { code } of await told) expect(['ERR_TEST_NOT_RUNNING', 'ERR_TEST_BLOCKED']).toContain(code);
      expect(await tested.names()).toEqual([]);
      end.open();
      expect((await holds).status).toBe(500);
      expect(await complaints()).toEqual([]);
    }),
  );

  it(
    'names the request, and the test, that has left a transaction open',
    inTest(async () => {
      const leaves: Handler = async (_req, res) => [await (await tested.knex.transaction())('items').insert({ name: 'x' }), res.end()];
      await send(leaves, '/leaves').expect(200);
      expect(await complaints()).toEqual([expect.stringMatching(/^ERR_TEST_LEFT_OPEN GET \/leaves has left a transaction open/)]);

      await tested.kit.begin();
      const trx = await tested.knex.transaction();
      await trx('items').insert({ name: 'x' });
      expect(await complaints()).toEqual([expect.stringMatching(/^ERR_TEST_LEFT_OPEN The test has left a transaction open/)]);
      await expect(trx('items')).rejects.toMatchObject({ code: 'ERR_TEST_NOT_RUNNING' });

      await tested.kit.begin();
      expect(await tested.names()).toEqual([]);
      expect(await complaints()).toEqual([]);
    }),
  );
});
