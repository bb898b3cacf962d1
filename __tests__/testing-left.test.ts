import { testDatabase } from 'express-knex-session/testing';
import request from 'supertest';
import { createDatabase } from './support/database';
import { listen } from './support/http';
import { eventually } from './support/pool';
import { caught, gate, type Handler, useTestedApp } from './support/tested-app';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const tested = useTestedApp({ byHand: true, waitTimeout: 200 });

const stores: Handler = async (req, res) => {
  await req.session('items').insert({ name: 'sent' });
  res.sendStatus(201);
};

describe('when a test does not wait for a request that it has sent', () => {
  const clients: [string, (url: string) => unknown][] = [
    [
      'supertest, whose server is still to listen',
      () =>
        request(tested.app(stores))
          .post('/transfers')
          .end(() => {}),
    ],
    [
      'supertest',
      (url) =>
        request(url)
          .post('/transfers')
          .end(() => {}),
    ],
    ['fetch', (url) => void fetch(`${url}/transfers`, { method: 'POST' }).catch(() => {})],
  ];
  it.each(clients)('names it at the end of that test, though it may not have arrived: %s', async (_name, send) => {
    const server = await listen(tested.app(stores));
    await tested.kit.begin();
    send(server.url);
    await expect(tested.kit.rollback()).rejects.toMatchObject({
      code: 'ERR_TEST_LEFT_OPEN',
      message: expect.stringContaining('POST /transfers'),
    });
    await tested.kit.begin();
    expect(await tested.names()).toEqual([]);
    await tested.kit.rollback();
    await server.close();
  });

  it('says nothing of one that its client has given up', async () => {
    const { opened, open } = gate();
    const server = await listen(
      tested.app(async (_req, res) => {
        await opened;
        res.end();
      }),
    );
    await tested.kit.begin();
    const abort = new AbortController();
    const answer = caught(fetch(server.url, { signal: abort.signal }));
    await eventually(async () => expect(await connections(server.server)).toBe(1));
    abort.abort();
    await answer;
    await tested.kit.rollback();
    open();
    await server.close();
  });

  it('says nothing of a response that goes on for long, and has no transaction', async () => {
    const server = await listen(tested.app((_req, res) => void res.type('text/event-stream').flushHeaders()));
    await tested.kit.begin();
    const response = await fetch(server.url);
    await tested.kit.rollback();
    await response.body?.cancel();
    await server.close();
  });
});

describe('when the test fakes the time', () => {
  afterEach(() => {
    jest.useRealTimers();
  });

  it('serves requests, and names what is left, all the same', async () => {
    await tested.kit.begin();
    jest.useFakeTimers({ doNotFake: ['nextTick', 'setImmediate', 'queueMicrotask'] });
    for (let number = 0; number < 3; number++) {
      await request(
        tested.app((req, res) =>
          req
            .session('items')
            .insert({ name: `${number}` })
            .then(() => res.sendStatus(201)),
        ),
      )
        .get('/')
        .expect(201);
    }
    expect(await tested.names()).toEqual(['0', '1', '2']);
    await tested.knex.transaction();
    await expect(tested.kit.rollback()).rejects.toMatchObject({ code: 'ERR_TEST_LEFT_OPEN' });
  });
});

describe('when the application shuts down, or rollback() is missing', () => {
  it('ends the test, and says so, rather than wait for ever', async () => {
    const own = await createDatabase();
    const original = own.knex();
    const { knex, begin } = testDatabase(original);
    await begin();
    await knex.raw('SELECT 1');
    await expect(original.destroy()).rejects.toMatchObject({
      code: 'ERR_TEST_LEFT_OPEN',
      message: expect.stringContaining('afterEach(database.rollback)'),
    });
    await own.drop();
  });

  it('serves the next test when the application has destroyed its Knex', async () => {
    await tested.kit.begin();
    await tested.knex('items');
    await tested.knex.destroy();
    await tested.kit.rollback();
    await tested.kit.begin();
    expect(await tested.names()).toEqual([]);
    await tested.kit.rollback();
  });
});

describe('when the runner has given a test up that was made by inTransaction()', () => {
  it('refuses what it still does', async () => {
    const { opened, open } = gate();
    const late = caught(
      tested.kit.inTransaction(async () => {
        await opened;
        await tested.knex('items').insert({ name: 'late' });
      })(),
    );
    await tested.kit.begin();
    open();
    expect(await late).toMatchObject({ code: 'ERR_TEST_NOT_RUNNING' });
    expect(await tested.names()).toEqual([]);
    await tested.kit.rollback();
  });
});

function connections(server: { getConnections(callback: (error: unknown, count: number) => void): void }): Promise<number> {
  return new Promise((resolve) => server.getConnections((_error, count) => resolve(count)));
}
