import { setTimeout as sleep } from 'node:timers/promises';
import { withSession } from 'express-knex-session';
import createKnex, { type Knex } from 'knex';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred, useBench } from './support/wire';

failOnWarnings();

const pipelined = (url: string) => ({ connection: { connectionString: url, pipeline: true } as never });
const busyFor = (ms: number): void => {
  const until = performance.now() + ms;
  while (performance.now() < until);
};

describe("when connections are in pg's pipeline mode", () => {
  const bench = useBench(pipelined);

  it('keeps what follows out of the way of a cancel that is late (hazard 13)', async () => {
    const ends: unknown[] = [];
    let isHeld = false;
    // The cancel takes longer than the statement that it is for.
    bench.proxy.onFrontend(({ type }) => {
      if (type !== 'CancelRequest' || isHeld) return undefined;
      isHeld = true;
      return sleep(300);
    });
    const answer = await bench.answer(async (req, res) => {
      const { session } = req;
      await session.raw('select 1');
      await session
        .select(session.raw('pg_sleep(0.2)'))
        .timeout(100, { cancel: true })
        .catch(() => {});
      await session.select(session.raw('pg_sleep(0.5)')).then(
        () => ends.push('ran'),
        (error) => ends.push(error.code),
      );
      res.end();
    });
    expect([answer.status, ends]).toEqual([200, ['ran']]);
  });

  it('lets a client class of its own call pg in its other way', async () => {
    type Send = (text: string, values: unknown[], callback: (error: unknown, result: unknown) => void) => void;
    const Client_PG = bench.knex.client.constructor as new (config: Knex.Config) => object;
    class Own extends Client_PG {
      async _query(connection: { query: Send }, statement: { sql: string; bindings?: unknown[]; response?: unknown }): Promise<object> {
        statement.response = await new Promise((resolve, reject) => {
          connection.query(statement.sql, statement.bindings ?? [], (error, result) => (error ? reject(error) : resolve(result)));
        });
        return statement;
      }
    }
    const knex = createKnex({ ...bench.knex.client.config, client: Own as never, acquireConnectionTimeout: 2_000 });
    const found = await withSession(
      knex,
      async (session) => {
        const together = await Promise.all([1, 2].map((n) => session.raw('SELECT ?::int AS n', [n])));
        return [...together, await session.raw('SELECT 3 AS n')].map(({ rows }) => rows[0].n);
      },
      { transactionTimeout: 2_000 },
    );
    expect(found).toEqual([1, 2, 3]);
    await knex.destroy();
  });

  it('runs nothing behind COMMIT, by whichever lease', async () => {
    const commit = deferred();
    bench.proxy.onFrontend(({ text }) => (text === 'COMMIT;' ? commit.promise : undefined));
    let late: unknown;
    await bench.answer(async (req, res) => {
      const { session } = req;
      const lease = await session.client.acquireConnection();
      await session('items').insert({ name: 'a' }).connection(lease);
      res.end();
      await eventually(() => expect(bench.proxy.sql()).toContain('COMMIT;'));
      late = await session('items')
        .insert({ name: 'b' })
        .connection(lease)
        .catch((error) => error.code);
      commit.resolve();
    });
    expect([late, await bench.stored()]).toEqual(['ERR_SESSION_CLOSED', ['a']]);
  });

  it('keeps the first error as cause, if its answer and that of a success before it come in one piece', async () => {
    await bench.answer(async (req, res) => {
      const { session } = req;
      const first = session.raw('select 1').then(() => {});
      const second = session.raw('select pg_sleep(0.1)').then(() => {});
      await first;
      const failing = session.raw('select 1/0').then(
        () => {},
        () => {},
      );
      await sleep(20);
      busyFor(300);
      await Promise.all([second, failing]);
      res.end('fine');
    });
    expect(bench.errors).toMatchObject([{ code: 'ERR_TRANSACTION_ABORTED', cause: { code: '22012' } }]);
  });

  it('begins with the second, if a listener refuses the first and the second was sent behind it', async () => {
    const refuse = ({ sql }: { sql: string }): void => {
      if (sql.includes('forbidden')) throw new Error('forbidden');
    };
    bench.knex.on('query', refuse);
    const answer = await bench.answer(async (req, res) => {
      const { session } = req;
      const results = await Promise.allSettled([
        session.raw('select 1 as forbidden'),
        session('items').insert({ name: 'a' }),
        session('items').insert({ name: 'b' }),
      ]);
      res.json(results.map(({ status }) => status));
    });
    bench.knex.off('query', refuse);
    expect(JSON.parse(answer.body)).toEqual(['rejected', 'fulfilled', 'fulfilled']);
    expect((await bench.stored()).sort()).toEqual(['a', 'b']);
  });

  it('does not send others beside a raw text that may end the transaction after all', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session.raw('select 1');
      await Promise.allSettled([req.session.raw('/* /* */ */ COMMIT'), req.session('items').insert({ name: 'a' })]);
      res.end();
    });
    expect([answer.status, await bench.stored()]).toEqual([500, []]);
  });

  it("names the transaction of the statement that failed in Knex's events", async () => {
    const told: unknown[] = [];
    const listen = (_error: unknown, { sql, __knexTxId }: { sql: string; __knexTxId: string }): void => {
      told.push([sql.slice(0, 6), __knexTxId]);
    };
    bench.knex.on('query-error', listen);
    let nestedId: unknown;
    await bench.answer(async (req, res) => {
      await req.session.raw('select 1');
      await Promise.all([
        req.session
          .transaction(async (nested) => {
            nested.on('query', ({ __knexTxId }) => {
              nestedId = __knexTxId;
            });
            await nested('items').insert({ name: 'bad' });
          })
          .catch(() => {}),
        sleep(0).then(() => req.session('items').insert({ name: 'a' })),
      ]);
      res.end();
    });
    bench.knex.off('query-error', listen);
    expect(told[0]).toEqual(['insert', nestedId]);
  });
});

describe('when swallowed errors of read-only sessions come in pipeline mode', () => {
  const bench = useBench(pipelined, { readOnly: true });

  it('does not answer as if nothing had failed', async () => {
    const answer = await bench.answer(async (req, res) => {
      const { session } = req;
      const first = session.raw('select 1').then(() => {});
      const second = session.raw('select pg_sleep(0.1)').then(() => {});
      await first;
      const failing = session.raw('select 1/0').then(
        () => {},
        () => {},
      );
      await sleep(20);
      busyFor(300);
      await Promise.all([second, failing]);
      res.end('fine');
    });
    expect(answer.status).toBe(500);
  });
});

describe('when the first connection of a process has just been half closed', () => {
  const bench = useBench({}, { isolationLevel: 'repeatable read' });

  it('sends BEGIN on the next one all the same', async () => {
    let isFirst = true;
    const endAtBegin = ({ sql }: { sql: string }): void => {
      if (!isFirst || !sql.startsWith('BEGIN')) return;
      isFirst = false;
      // What Node does when the server's FIN has come; 'close' follows a turn later.
      (bench.held() as unknown as { connection: { stream: { end(): void } } }).connection.stream.end();
    };
    bench.knex.on('query', endAtBegin);
    const insert = (name: string) =>
      bench.answer(async (req) => {
        await req.session('items').insert({ name });
        throw Object.assign(new Error('rolled back'), { status: 418 });
      });
    expect((await insert('a')).status).toBe(503);
    expect((await insert('b')).status).toBe(418);
    bench.knex.off('query', endAtBegin);
    expect(await bench.stored()).toEqual([]);
  });
});
