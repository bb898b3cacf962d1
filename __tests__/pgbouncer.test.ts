import express, { type ErrorRequestHandler, type RequestHandler } from 'express';
import { sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import { type Answer, get, type Listening, listen } from './support/http';
import { describeBehindPgBouncer, usePooledDatabase } from './support/pgbouncer';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { sent } from './support/wire';

failOnWarnings();

describeBehindPgBouncer('behind PgBouncer in transaction mode', () => {
  // One connection to the server: every transaction of these tests runs on it.
  const pooled = usePooledDatabase({ default_pool_size: 1 });
  let listening: Listening;
  let handler: RequestHandler;
  const errors: any[] = [];

  beforeAll(async () => {
    const answerError: ErrorRequestHandler = (error, _req, res, _next) => {
      errors.push(error);
      res.status(error.status ?? 500).json({ code: error.code });
    };
    const app = express().use(sessionMiddleware(pooled.knex));
    app.use((req, res, next) => handler(req, res, next));
    listening = await listen(app.use(sessionErrorHandler(), answerError));
  });
  beforeEach(() => {
    errors.length = 0;
  });
  afterEach(async () => {
    await eventually(async () => expect(await pooled.busyBackends()).toEqual([]));
    expect(poolUsage(pooled.knex)).toMatchObject({ used: 0, pendingAcquires: 0 });
    expect(pooled.pooler.isAlive()).toBe(true);
  });
  afterAll(() => listening.close());

  const answer = (serve: RequestHandler): Promise<Answer> => {
    handler = serve;
    return get(listening.url, { signal: AbortSignal.timeout(5_000) });
  };

  describe('when a request succeeds', () => {
    it('sends BEGIN in one group with the first statement, and commits before the response', async () => {
      await pooled.knex.raw('SELECT 1');
      pooled.proxy.reset();
      const { status } = await answer(async (req, res) => {
        await req.session('notes').insert({ id: 'a' });
        await req.session('notes').insert({ id: 'b' });
        res.sendStatus(201);
      });
      expect(status).toBe(201);
      expect(await pooled.stored()).toEqual(['a', 'b']);
      const insert = 'P(insert into "notes" ("id") values ($1)) B D E S';
      expect(sent(pooled.proxy)).toBe(`P(BEGIN;) B E ${insert} ${insert} Q(COMMIT;)`);
    });

    it('runs all of it in one transaction of the server', async () => {
      const seen: unknown[] = [];
      await answer(async (req, res) => {
        for (let i = 0; i < 3; i++)
          seen.push((await req.session.raw('SELECT pg_current_xact_id() AS id, pg_backend_pid() AS pid')).rows[0]);
        res.end();
      });
      expect(seen).toEqual(Array(3).fill(seen[0]));
    });
  });

  describe('when a request fails', () => {
    it('rolls back what a handler wrote that throws', async () => {
      const { status } = await answer(async (req) => {
        await req.session('notes').insert({ id: 'a' });
        throw new Error('mine');
      });
      expect(status).toBe(500);
      expect(errors).toMatchObject([{ message: 'mine' }]);
      expect(await pooled.stored()).toEqual([]);
    });

    it('never runs a first statement outside of its transaction', async () => {
      for (let i = 0; i < 20; i++) {
        await withSession(pooled.knex, async (session) => {
          await session('notes').insert({ id: `${i}` });
          throw new Error('mine');
        }).catch(() => {});
      }
      expect(await pooled.stored()).toEqual([]);
    });

    it('answers 500 instead of the 201 when COMMIT fails', async () => {
      const { status } = await answer(async (req, res) => {
        await req.session('notes').insert({ id: 'refused' });
        res.sendStatus(201);
      });
      expect(status).toBe(500);
      expect(errors).toMatchObject([{ code: '23514' }]);
      expect(await pooled.stored()).toEqual([]);
    });

    it('answers 500 instead of the 201 when an error was swallowed', async () => {
      const { status } = await answer(async (req, res) => {
        await req.session('notes').insert({ id: 'a' });
        await req
          .session('notes')
          .insert({ id: 'a' })
          .catch(() => {});
        res.sendStatus(201);
      });
      expect(status).toBe(500);
      expect(errors).toMatchObject([{ code: 'ERR_TRANSACTION_ABORTED', cause: { code: '23505' } }]);
      expect(await pooled.stored()).toEqual([]);
    });
  });

  describe('when settings are local to a transaction', () => {
    it('does not leak them to the next one on the same connection of the server', async () => {
      const seen: unknown[] = [];
      const look: RequestHandler = async (req, res) => {
        const { rows } = await req.session.raw("SELECT current_setting('app.tenant', true) AS tenant, pg_backend_pid() AS pid");
        seen.push(rows[0]);
        res.end();
      };
      await answer(async (req, res, next) => {
        await req.session.raw("SELECT set_config('app.tenant', 'a', true)");
        await look(req, res, next);
      });
      await answer(look);
      const { pid } = seen[0] as { pid: number };
      expect(seen).toEqual([
        { tenant: 'a', pid },
        { tenant: '', pid },
      ]);
    });
  });

  describe('when a timeout is given as a startup parameter (hazard 19)', () => {
    it('answers 503 with what PgBouncer says', async () => {
      const connection = { connectionString: pooled.url, statement_timeout: 1_000 };
      const refused = pooled.database.knex({ connection, log: { warn() {}, error() {} } });
      const work = withSession(refused, (session) => session('notes'));
      await expect(work).rejects.toMatchObject({
        code: 'ERR_SESSION_UNAVAILABLE',
        status: 503,
        cause: { code: '08P01', message: 'unsupported startup parameter: statement_timeout' },
      });
    });
  });

  describe('when a timeout is set on the database', () => {
    const setting = async (name: string, value: string): Promise<void> => {
      await pooled.database.admin.raw(`
        DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET ${name} = ${value}', current_database()); END $$;
        SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`);
    };

    it('rolls back when a statement takes too long, and keeps the connection', async () => {
      await setting('statement_timeout', '50');
      const { status } = await answer(async (req, res) => {
        await req.session('notes').insert({ id: 'a' });
        await req.session.raw('SELECT pg_sleep(10)');
        res.sendStatus(201);
      });
      expect(status).toBe(500);
      expect(errors).toMatchObject([{ code: '57014' }]);
      expect(await pooled.stored()).toEqual([]);
      expect(poolUsage(pooled.knex).free).toBe(1);
    });

    it('rolls back when a transaction is idle for too long, and destroys the connection', async () => {
      await setting('statement_timeout', '0');
      await setting('idle_in_transaction_session_timeout', '50');
      const { status } = await answer(async (req, res) => {
        await req.session('notes').insert({ id: 'a' });
        await eventually(async () => expect(await pooled.busyBackends()).toEqual([]));
        await req.session('notes').insert({ id: 'b' });
        res.sendStatus(201);
      });
      expect(status).toBe(500);
      expect(errors).toMatchObject([{ code: '25P03' }]);
      expect(await pooled.stored()).toEqual([]);
      await eventually(() => expect(pooled.proxy.connections()).toBe(0));
      await setting('idle_in_transaction_session_timeout', '0');
    });
  });

  describe('when the server ends a connection', () => {
    it('answers 500 if it was in a transaction, and stores nothing', async () => {
      const { status } = await answer(async (req, res) => {
        await req.session('notes').insert({ id: 'a' });
        await req.session.raw('SELECT pg_terminate_backend(pg_backend_pid())');
        res.sendStatus(201);
      });
      expect(status).toBe(500);
      expect(errors).toMatchObject([{ code: '57P01' }]);
      expect(await pooled.stored()).toEqual([]);
      await eventually(() => expect(pooled.proxy.connections()).toBe(0));
    });

    it('is not noticed if it was idle: PgBouncer takes another', async () => {
      await pooled.knex.raw('SELECT 1');
      await pooled.database.admin.raw(
        'SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()',
      );
      const { status } = await answer(async (req, res) => {
        await req.session('notes').insert({ id: 'a' });
        res.sendStatus(201);
      });
      expect(status).toBe(201);
      expect(await pooled.stored()).toEqual(['a']);
    });
  });
});
