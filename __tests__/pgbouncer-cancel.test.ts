import { setTimeout as delay } from 'node:timers/promises';
import type { RequestHandler } from 'express';
import { withSession } from 'express-knex-session';
import { RawClient } from './support/http';
import { describeBehindPgBouncer, usePooledDatabase } from './support/pgbouncer';
import { eventually, poolUsage } from './support/pool';
import { ask, isSound, withApp } from './support/pooled-app';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

describeBehindPgBouncer('behind PgBouncer', () => {
  const pooled = usePooledDatabase({ default_pool_size: 2 });
  afterEach(() => isSound(pooled));

  describe('when the client disconnects while a statement runs', () => {
    it('cancels it on the server (hazard 12), rolls back, and has the connection back within a second', async () => {
      let reason: any;
      const handler: RequestHandler = async (req, res) => {
        await req.session('notes').insert({ id: 'a' });
        req.session.signal.addEventListener('abort', () => {
          reason = req.session.signal.reason;
        });
        await req.session.raw('SELECT pg_sleep(20)');
        res.end();
      };
      await withApp(pooled.knex, {}, handler, async ({ port, errors }) => {
        const client = (await RawClient.connect(port)).get('/');
        await eventually(async () => expect(await pooled.busyBackends()).toMatchObject([{ query: 'SELECT pg_sleep(20)' }]));
        const left = performance.now();
        await client.reset();
        await eventually(async () => {
          expect(await pooled.busyBackends()).toEqual([]);
          expect(poolUsage(pooled.knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 });
        });
        expect(performance.now() - left).toBeLessThan(1_000);
        expect(reason).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
        await eventually(() => expect(errors).toEqual([reason]));
        expect(reason.cause).toMatchObject({ code: '57014' });
        expect(await pooled.stored()).toEqual([]);
      });
    });

    it('does so if it is the first statement, too, which comes with BEGIN', async () => {
      const handler: RequestHandler = async (req) => {
        await req.session.raw('SELECT pg_sleep(?)', [20]);
      };
      await withApp(pooled.knex, {}, handler, async ({ port }) => {
        const client = (await RawClient.connect(port)).get('/');
        await eventually(async () => expect(await pooled.busyBackends()).toHaveLength(1));
        const left = performance.now();
        await client.reset();
        await eventually(async () => expect(await pooled.busyBackends()).toEqual([]));
        await eventually(() => expect(poolUsage(pooled.knex)).toMatchObject({ used: 0 }));
        expect(performance.now() - left).toBeLessThan(1_000);
      });
    });

    // They are random 32-bit numbers, which the driver reads as signed ones.
    it('does so whatever process id PgBouncer has invented', async () => {
      const handler: RequestHandler = async (req) => {
        await req.session.raw('SELECT pg_sleep(20)');
      };
      for (let i = 0; i < 8; i++) {
        const knex = pooled.database.knex({ connection: pooled.url, pool: { min: 0, max: 1 } });
        await withApp(knex, {}, handler, async ({ port }) => {
          const client = (await RawClient.connect(port)).get('/');
          await eventually(async () => expect(await pooled.busyBackends()).toHaveLength(1));
          await client.reset();
          await eventually(async () => expect(await pooled.busyBackends()).toEqual([]), 1_000);
        });
      }
    });
  });

  describe('when the transaction is open for too long', () => {
    it('cancels the statement, and answers 503', async () => {
      const handler: RequestHandler = async (req, res) => {
        await req.session('notes').insert({ id: 'a' });
        await req.session.raw('SELECT pg_sleep(20)');
        res.end();
      };
      await withApp(pooled.knex, { transactionTimeout: 150 }, handler, async ({ url, errors }) => {
        expect(await ask(url)).toMatchObject({ status: 503 });
        expect(errors).toMatchObject([{ code: 'ERR_SESSION_TIMEOUT' }]);
        expect(await pooled.stored()).toEqual([]);
        expect(poolUsage(pooled.knex).free).toBe(1);
      });
    });
  });

  describe('when 150 clients disconnect at the moment at which their statement ends (hazard 13)', () => {
    it('hits no innocent transaction on the same connections of the server', async () => {
      const outcomes: string[] = [];
      const handler: RequestHandler = async (req, res) => {
        const statement = req.session.raw('SELECT pg_sleep(0.02)');
        statement.then(
          () => outcomes.push('late'),
          (error) => outcomes.push(error.cause?.code ?? error.code),
        );
        await statement;
        res.end();
      };
      const innocents = pooled.database.knex({ connection: pooled.url, pool: { min: 0, max: 4 } });
      let isOver = false;
      let count = 0;
      const innocent = async (): Promise<void> => {
        while (!isOver) {
          await withSession(innocents, async (session) => {
            await session('notes').insert({ id: `innocent ${++count}` });
            await session.raw('SELECT pg_sleep(0.002)');
          });
        }
      };

      await withApp(pooled.knex, {}, handler, async ({ port }) => {
        const running = Promise.all([innocent(), innocent()]);
        const leave = async (i: number): Promise<void> => {
          const client = (await RawClient.connect(port)).get('/');
          await delay(15 + (i % 30));
          await client.reset();
        };
        for (let i = 0; i < 150; i += 3) await Promise.all([leave(i), leave(i + 1), leave(i + 2)]);
        await eventually(() => expect(poolUsage(pooled.knex)).toMatchObject({ used: 0, pendingAcquires: 0 }));
        isOver = true;
        await running;
      });
      expect((await pooled.stored()).length).toBe(count);
      expect(count).toBeGreaterThan(50);
      // Cancels that come in time and cancels that come late: with one kind only, nothing would be shown.
      expect(outcomes).toEqual(expect.arrayContaining(['57014', 'late']));
    });
  });
});
