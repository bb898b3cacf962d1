import { once } from 'node:events';
import { pipeline } from 'node:stream/promises';
import type express from 'express';
import { RawClient } from './support/http';
import { meetingPoint, waysToLeave } from './support/leaving';
import { controlOf, flavours, insert, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

describe.each(flavours)('on $version', (flavour) => {
  const serve = ledger.serving(flavour);
  const callFrom = async (port: number, path = '/') => (await RawClient.connect(port)).get(path);

  describe.each(waysToLeave)('when the client disconnects (%s)', (_, leave) => {
    it('before the first statement: refuses it by name, and takes no connection', async () => {
      const { knex, proxy } = await ledger.throughProxy();
      const point = meetingPoint();
      const { port, errors } = await serve(
        async (req, res) => {
          const gone = once(res, 'close');
          await point.arrive();
          await gone;
          await insert(req, 'a');
        },
        { knex },
      );
      const client = await callFrom(port);
      await point.reached;
      await leave(client);
      point.goOn();
      await eventually(() => expect(errors).toHaveLength(1));
      expect(errors[0]).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('client has disconnected') });
      expect(proxy.connections()).toBe(0);
    });

    // Scenario 31.
    it('while waiting for the pool: gives up, gives the connection back at once when it comes, and runs nothing', async () => {
      const { knex, proxy } = await ledger.throughProxy({ pool: { min: 0, max: 1 } });
      const taken = await knex.transaction();
      const { port, errors } = await serve(
        async (req, res) => {
          await insert(req, 'a');
          res.sendStatus(201);
        },
        { knex },
      );
      const client = await callFrom(port);
      await eventually(() => expect(poolUsage(knex)).toMatchObject({ used: 1, pendingAcquires: 1 }));

      await leave(client);

      await eventually(() => expect(errors).toHaveLength(1));
      expect(errors[0]).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('client has disconnected') });
      proxy.reset();
      await taken.rollback();
      await ledger.isClean(knex);
      expect(proxy.sql()).toEqual(['ROLLBACK']);
      expect(await ledger.stored()).toEqual([]);
    });

    it('between statements: rolls back, gives the connection back though the handler hangs, and refuses the next statement', async () => {
      const point = meetingPoint();
      const { port, errors } = await serve(async (req, res) => {
        await insert(req, 'a');
        await point.arrive();
        await insert(req, 'b');
        res.sendStatus(201);
      });
      const client = await callFrom(port);
      await point.reached;
      expect(poolUsage(ledger.knex).used).toBe(1);

      await leave(client);

      await ledger.isClean();
      expect(await ledger.stored()).toEqual([]);
      point.goOn();
      await eventually(() => expect(errors).toHaveLength(1));
      expect(errors[0]).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('client has disconnected') });
      expect(await ledger.stored()).toEqual([]);
    });

    it('between statements: commits nothing if the handler then says 201', async () => {
      const { knex, proxy } = await ledger.throughProxy();
      const point = meetingPoint();
      const done = meetingPoint();
      const { port, errors } = await serve(
        async (req, res) => {
          await insert(req, 'a');
          await point.arrive();
          res.status(201).json({ ok: true });
          void done.arrive();
        },
        { knex },
      );
      const client = await callFrom(port);
      await point.reached;
      await leave(client);
      await ledger.isClean(knex);
      point.goOn();
      await done.reached;
      await ledger.isClean(knex);
      expect(controlOf(proxy)).toEqual(['BEGIN;', 'ROLLBACK']);
      expect(errors).toEqual([]);
      expect(await ledger.stored()).toEqual([]);
    });

    it('during a statement: rolls back behind it, and runs none of those that wait', async () => {
      const { knex, proxy } = await ledger.throughProxy();
      const held = await ledger.holdCommits();
      let response: express.Response | undefined;
      const { port, errors } = await serve(
        async (req, res) => {
          response = res;
          await insert(req, 'a');
          await Promise.all([req.session.raw('SELECT pg_advisory_xact_lock(1)'), insert(req, 'b')]);
        },
        { knex },
      );
      const client = await callFrom(port);
      await held.waiting();
      await leave(client);
      await eventually(() => expect(response?.destroyed).toBe(true));
      await held.release();
      await eventually(() => expect(errors).toHaveLength(1));
      expect(errors[0]).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
      await ledger.isClean(knex);
      expect(proxy.sql().filter((sql) => sql.startsWith('insert'))).toHaveLength(1);
      expect(controlOf(proxy)).toEqual(['BEGIN;', 'ROLLBACK']);
    });

    // Scenario 30.
    it('during COMMIT: leaves it to finish, with one outcome', async () => {
      const { knex, proxy } = await ledger.throughProxy();
      const held = await ledger.holdCommits();
      let request: express.Request | undefined;
      const { port, errors } = await serve(
        async (req, res) => {
          request = req;
          await insert(req, 'a', 'wait');
          res.status(201).json({ ok: true });
        },
        { knex },
      );
      const client = await callFrom(port);
      await held.waiting();
      await leave(client);
      await held.release();
      await ledger.isClean(knex);
      await eventually(() => expect(request?.session.outcome).toBe('committed'));
      expect(controlOf(proxy)).toEqual(['BEGIN;', 'COMMIT;']);
      expect(errors).toEqual([]);
      expect(await ledger.stored()).toEqual(['a']);
    });

    it('during a COMMIT that fails: leaks nothing, and the error reaches the error handlers', async () => {
      const held = await ledger.holdCommits();
      const { port, errors } = await serve(async (req, res) => {
        await insert(req, 'a', 'wait');
        await insert(req, 'b', 'fail');
        res.status(201).json({ ok: true });
      });
      const client = await callFrom(port);
      await held.waiting();
      await leave(client);
      await held.release();
      await eventually(() => expect(errors).toHaveLength(1));
      expect(errors[0]).toMatchObject({ code: '23514' });
      await ledger.isClean();
      expect(await ledger.stored()).toEqual([]);
    });

    // Hazard 28: such a response never emits `close`.
    it('with a request that waits behind another one (pipelining): rolls both back', async () => {
      const handlers: (() => void)[] = [];
      const { port } = await serve(async (req) => {
        await insert(req, req.path);
        await new Promise<void>((resolve) => handlers.push(resolve));
      });
      const client = await RawClient.connect(port);
      client.get('/first').get('/second').get('/third');
      await eventually(() => expect(handlers).toHaveLength(3));
      expect(poolUsage(ledger.knex).used).toBe(3);
      await leave(client);
      await ledger.isClean();
      expect(await ledger.stored()).toEqual([]);
    });

    it('while a stream of the session is being read: rolls back', async () => {
      const { port } = await serve(async (req, res) => {
        await insert(req, 'a');
        const rows = req.session.raw("SELECT repeat('x', 10000) AS x FROM generate_series(1, 100000)").stream();
        await pipeline(rows, lines, res).catch(() => {});
      });
      const client = await callFrom(port);
      await client.readUntil('xxxxx');
      await leave(client);
      await ledger.isClean();
      expect(await ledger.stored()).toEqual([]);
    });
  });
});

async function* lines(rows: AsyncIterable<object>): AsyncGenerator<string> {
  for await (const row of rows) yield `${JSON.stringify(row)}\n`;
}
