import type { RequestHandler } from 'express';
import type { Knex } from 'knex';
import { RawClient } from './support/http';
import { describeBehindPgBouncer, usePooledDatabase } from './support/pgbouncer';
import { eventually, poolUsage } from './support/pool';
import { ask, isSound, withApp } from './support/pooled-app';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

describeBehindPgBouncer("when PgBouncer's pool is smaller than the app's", () => {
  const pooled = usePooledDatabase({ default_pool_size: 2, query_wait_timeout: 1 }, 8);
  const holding: Knex.Transaction[] = [];
  const fill = async (): Promise<void> => {
    const holders = pooled.database.knex({ connection: pooled.url });
    holding.push(...(await Promise.all([holders.transaction(), holders.transaction()])));
  };
  const release = async (): Promise<void> => {
    for (const transaction of holding.splice(0)) await transaction.commit();
  };
  afterEach(async () => {
    await release();
    await isSound(pooled);
  });
  /** PgBouncer only looks at a connection that waits when it has a server for it: what was sent is run then, and rolled back. */
  const releaseAndRest = async (): Promise<void> => {
    await release();
    await eventually(async () => expect({ waiting: await waiting(), busy: await pooled.busyBackends() }).toEqual({ waiting: 0, busy: [] }));
  };
  const waiting = async (): Promise<number> => (await pooled.pools()).reduce((sum, { cl_waiting }) => sum + cl_waiting, 0);

  it('serves all requests, each in its own transaction', async () => {
    const handler: RequestHandler = async (req, res) => {
      const id = req.url.slice(1);
      await req.session('notes').insert({ id: `${id} a` });
      await req.session('notes').insert({ id: `${id} b` });
      res.sendStatus(Number(id) % 3 === 0 ? 409 : 201);
    };
    await withApp(pooled.knex, {}, handler, async ({ url }) => {
      const ids = Array.from({ length: 60 }, (_, i) => i);
      const answers = await Promise.all(ids.map((id) => ask(`${url}/${id}`)));
      const kept = ids.filter((id) => id % 3 !== 0);
      expect(ids.filter((id) => answers[id]?.status === 201)).toEqual(kept);
      expect(new Set(await pooled.stored())).toEqual(new Set(kept.flatMap((id) => [`${id} a`, `${id} b`])));
    });
  });

  it('answers 503 when PgBouncer gives up the wait (query_wait_timeout): nothing was run', async () => {
    await fill();
    const handler: RequestHandler = async (req, res) => {
      await req.session('notes').insert({ id: 'a' });
      res.end();
    };
    await withApp(pooled.knex, {}, handler, async ({ url, errors }) => {
      expect(await ask(url)).toMatchObject({ status: 503 });
      expect(errors).toMatchObject([{ code: 'ERR_SESSION_UNAVAILABLE', cause: { code: '08P01' } }]);
      expect(errors[0].cause.message).toContain('query_wait_timeout');
    });
    await release();
    expect(await pooled.stored()).toEqual([]);
  });

  // A CancelRequest does nothing for a statement that still waits there (PgBouncer's issue #1222): what bounds it is settleTimeout.
  it('frees the slot of a client that disconnects while its first statement waits there', async () => {
    await fill();
    const handler: RequestHandler = async (req, res) => {
      await req.session('notes').insert({ id: 'a' });
      res.end();
    };
    await withApp(pooled.knex, { settleTimeout: 150 }, handler, async ({ port, errors }) => {
      const client = (await RawClient.connect(port)).get('/');
      await eventually(async () => expect(await waiting()).toBe(1));
      await client.reset();
      await eventually(() => expect(poolUsage(pooled.knex)).toMatchObject({ used: 0, pendingAcquires: 0 }), 900);
      await eventually(() => expect(errors).toMatchObject([{ code: 'ERR_SESSION_CLOSED' }]));
    });
    await releaseAndRest();
    expect(await pooled.stored()).toEqual([]);
  });

  it('answers 503 when the transaction is open for too long, though all of that was waiting there', async () => {
    await fill();
    const reported: unknown[] = [];
    const options = { transactionTimeout: 150, settleTimeout: 150, onError: (error: unknown) => reported.push(error) };
    const handler: RequestHandler = async (req, res) => {
      await req.session('notes').insert({ id: 'a' });
      res.end();
    };
    await withApp(pooled.knex, options, handler, async ({ url, errors }) => {
      expect(await ask(url)).toMatchObject({ status: 503 });
      expect(errors).toMatchObject([{ code: 'ERR_SESSION_TIMEOUT' }]);
      expect(reported).toEqual([expect.objectContaining({ message: expect.stringContaining('settleTimeout') })]);
      expect(poolUsage(pooled.knex)).toMatchObject({ used: 0 });
    });
    await releaseAndRest();
    expect(await pooled.stored()).toEqual([]);
  });
});
