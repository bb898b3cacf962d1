import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { pipeline } from 'node:stream/promises';
import express from 'express';
import { cancelled, clientHasGone, ENDLESS, useAborts, type Victim } from './support/abort';
import { RawClient } from './support/http';
import { waysToLeave } from './support/leaving';
import { express5Flavour, type Handler, insert } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const aborts = useAborts();

const asSecond: Handler = async (req) => {
  await insert(req, 'a');
  await req.session.raw(ENDLESS);
};

/** What runs when the client leaves. */
const runningStatements: [string, Handler][] = [
  ['the first statement', (req) => req.session.raw(ENDLESS)],
  ['a later statement', asSecond],
  ['a query builder', (req) => req.session.select(req.session.raw('pg_sleep(30)'))],
  ['several statements in one string', (req) => req.session.raw(`INSERT INTO notes VALUES ('b'); ${ENDLESS}; SELECT 1`)],
  ['COPY', (req) => req.session.raw(`COPY (${ENDLESS}) TO STDOUT`)],
  ['a statement of a function that catches all errors', (req) => req.session.raw(`DO $$ BEGIN PERFORM pg_sleep(30); END $$`)],
  [
    'a statement in a savepoint',
    async (req) => {
      await insert(req, 'a');
      await req.session.transaction(async (savepoint) => {
        await savepoint('notes').insert({ id: 'b' });
        await savepoint.raw(ENDLESS);
      });
    },
  ],
  [
    'a statement in a savepoint in a savepoint, as the first',
    (req) => req.session.transaction((outer) => outer.transaction((inner) => inner.raw(ENDLESS))),
  ],
  [
    'a stream of rows whose server is busy',
    async (req) => {
      await insert(req, 'a');
      for await (const _ of req.session.raw('SELECT pg_sleep(30) FROM generate_series(1, 2)').stream());
    },
  ],
  [
    'a stream of rows that has begun',
    async (req) => {
      await insert(req, 'a');
      for await (const _ of req.session.raw('SELECT pg_sleep(n - 1) FROM unnest(ARRAY[1, 1, 31]) n').stream({ batchSize: 1 }));
    },
  ],
];

describe.each(waysToLeave)('when the client leaves (%s) in', (_, leave) => {
  it.each(runningStatements)('%s: it is cancelled, rolled back, and the connection is free, within a second', async (name, handler) => {
    const victim = await aborts.open(handler);
    await victim.isSleeping();
    await leave(victim.client);
    // The server's word on it goes to the driver's stream.
    await victim.wasAborted(name.startsWith('a stream') ? clientHasGone : cancelled);
  });

  it('a statement that others wait behind: none of them runs, and all are told the same', async () => {
    const { knex, proxy } = await aborts.ledger.throughProxy({ pool: { min: 0, max: 1 } });
    let results: PromiseSettledResult<unknown>[] = [];
    const victim = await aborts.open(
      async (req) => {
        await insert(req, 'a');
        const inSavepoint = req.session.transaction((savepoint) => savepoint('notes').insert({ id: 'd' }));
        results = await Promise.allSettled([req.session.raw(ENDLESS), insert(req, 'b'), insert(req, 'c'), inSavepoint]);
      },
      { knex },
    );
    await victim.isSleeping();
    await leave(victim.client);
    await victim.isOver();
    expect(results.map(({ status }) => status)).toEqual(['rejected', 'rejected', 'rejected', 'rejected']);
    const reasons = results.map((result) => (result as PromiseRejectedResult).reason);
    expect(reasons[0]).toBe(victim.reasons[0]);
    expect(reasons[0]).toMatchObject(cancelled);
    for (const reason of reasons) expect(reason).toMatchObject(clientHasGone);
    expect(proxy.sql().filter((sql) => sql.startsWith('insert'))).toHaveLength(1);
    await victim.leftNothing();
  });

  it('a statement, and the handler swallows its error and says 201: nothing is committed', async () => {
    const victim = await aborts.open(async (req, res, next) => {
      await Promise.resolve(asSecond(req, res, next)).catch((error) => expect(error).toMatchObject(cancelled));
      res.status(201).json({ ok: true });
    });
    await victim.isSleeping();
    await leave(victim.client);
    await victim.isOver();
    expect(victim.error).toBeUndefined();
    expect(victim.reasons).toHaveLength(1);
    expect(victim.client.received).toBe('');
    await victim.leftNothing();
  });
});

describe('when the client leaves in a running statement', () => {
  const reset = async (victim: Victim): Promise<void> => {
    await victim.isSleeping();
    await victim.client.reset();
  };

  it('of a request that waits behind another on its connection (pipelining): cancels it', async () => {
    const victim = await aborts.open((req, res, next) => (req.path === '/first' ? once(req.socket, 'close') : asSecond(req, res, next)), {
      head: 'GET /first HTTP/1.1',
      asksForSignal: false,
    });
    victim.client.get('/second');
    await reset(victim);
    await victim.isOver();
    await eventually(() => expect(victim.error).toMatchObject(cancelled));
    await victim.leftNothing();
  });

  it('of the second request on a kept-alive connection: cancels that one, and the first stays committed', async () => {
    const handlers: Handler[] = [(req, res) => insert(req, 'first').then(() => res.sendStatus(201)), asSecond];
    const victim = await aborts.open((req, res, next) => handlers.shift()?.(req, res, next));
    await victim.client.readUntil('Created');
    expect(victim.reasons).toEqual([]);
    victim.hasEnded = false;
    victim.client.get('/second');
    await reset(victim);
    await victim.isOver();
    expect(victim.reasons).toEqual([victim.error]);
    expect(await aborts.ledger.stored()).toEqual(['first']);
  });

  it('while a part of its upload has not been read: cancels it', async () => {
    const victim = await aborts.open(asSecond, { head: 'POST / HTTP/1.1\r\nContent-Length: 1000' });
    victim.client.write('half of it');
    await reset(victim);
    await victim.wasAborted();
  });

  it('while the handler reads its upload: cancels it', async () => {
    const victim = await aborts.open(
      async (req, res, next) => {
        req.on('error', () => {});
        req.resume();
        await asSecond(req, res, next);
      },
      { head: 'POST / HTTP/1.1\r\nContent-Length: 10000000' },
    );
    victim.client.write(Buffer.alloc(1_000_000));
    await reset(victim);
    await victim.wasAborted();
  });

  // Node has stopped reading from the socket then, and hears neither FIN nor RST.
  it('while more of its upload waits than Node reads ahead: transactionTimeout is the bound', async () => {
    const victim = await aborts.open(asSecond, { head: 'POST / HTTP/1.1\r\nContent-Length: 10000000', transactionTimeout: 300 });
    victim.client.write(Buffer.alloc(1_000_000));
    await reset(victim);
    await victim.wasAborted({ code: 'ERR_SESSION_TIMEOUT', cause: { code: '57014' } });
  });

  it('and an error comes at the same time: nothing is stored, and nothing leaks', async () => {
    const victim = await aborts.open(async (req, res, next) => {
      res.once('close', () => next(new Error('mine')));
      await asSecond(req, res, next);
    });
    await reset(victim);
    await victim.isOver();
    await victim.leftNothing();
  });

  it("ends what the handler does elsewhere by the session's signal", async () => {
    const slow = createServer(() => {}).listen(0, '127.0.0.1');
    await once(slow, 'listening');
    const { port } = slow.address() as AddressInfo;
    try {
      const victim = await aborts.open(async (req) => {
        await insert(req, 'a');
        await fetch(`http://127.0.0.1:${port}`, { signal: req.session.signal });
      });
      await once(slow, 'request');
      await victim.client.reset();
      await victim.wasAborted(clientHasGone);
    } finally {
      slow.closeAllConnections();
      slow.close();
    }
  });
});

describe('when the client leaves', () => {
  const { ledger } = aborts;

  it('while a connection is opened for it: gives up at once, and runs nothing on the connection that comes late', async () => {
    const { knex, proxy } = await ledger.throughProxy({ pool: { min: 0, max: 1 } });
    proxy.pause();
    const { port, errors } = await ledger.serving(express5Flavour)(async (req) => void (await insert(req, 'a')), { knex });
    const client = (await RawClient.connect(port)).get('/');
    await eventually(() => expect(proxy.connections()).toBe(1));
    await client.reset();
    await eventually(() => expect(errors).toMatchObject([clientHasGone]));
    proxy.resume();
    await eventually(() => expect(poolUsage(knex)).toMatchObject({ used: 0, free: 1, pendingAcquires: 0 }));
    // Knex asks each new connection for its version.
    expect(proxy.sql().filter((sql) => !sql.includes('version()'))).toEqual([]);
  });

  it('during session.commit(): that is left to finish, and the signal is not aborted', async () => {
    const held = await ledger.holdCommits();
    const victim = await aborts.open(async (req) => {
      await insert(req, 'a', 'wait');
      await req.session.commit();
      expect(req.session.outcome).toBe('committed');
    });
    await held.waiting();
    await victim.client.reset();
    await eventually(() => expect(victim.response.destroyed).toBe(true));
    await held.release();
    await victim.isOver();
    expect([victim.error, victim.reasons]).toEqual([undefined, []]);
    expect(await ledger.stored()).toEqual(['a']);
  });

  it.each(['GET', 'POST'])('half-closed, and reads no more of the rows that are streamed to it (%s): rolls back', async (method) => {
    const { url, port } = await ledger.serve(
      express5Flavour,
      (app) => {
        app.use(express.json());
        app.use(async (req, res) => {
          await insert(req, 'a');
          const rows = req.session.raw("SELECT repeat('x', 10000) AS x FROM generate_series(1, 100000)").stream();
          await pipeline(rows, lines, res).catch(() => {});
        });
      },
      { commitAt: 'end', onError: () => {} },
    );
    const body = method === 'GET' ? '' : '{}';
    const client = await RawClient.connect(port);
    client.write(`${method} / HTTP/1.1\r\nHost: ${url}\r\nContent-Type: application/json\r\nContent-Length: ${body.length}\r\n\r\n${body}`);
    await client.readUntil('xxxxx');
    client.pause().socket.end();
    await ledger.isClean();
    expect(await ledger.stored()).toEqual([]);
    await client.destroy();
  });
});

async function* lines(rows: AsyncIterable<object>): AsyncGenerator<string> {
  for await (const row of rows) yield `${JSON.stringify(row)}\n`;
}
