import { SessionError, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { inRequest, inSession, insert, Ledger, plainly, type Way } from './support/knex';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { startWireProxy } from './support/wire-proxy';

failOnWarnings();
const ledger = Ledger.forTests();

const ways = Object.entries({ plainly, inSession, inRequest });

describe('when a statement fails', () => {
  it('gives its listeners the object that the caller gets, once on each level', async () => {
    const knex = ledger.connect();
    const seen: unknown[] = [];
    const listen = (emitter: { on(event: string, listener: (error: unknown) => void): unknown }) =>
      emitter.on('query-error', (error) => seen.push(error));
    listen(knex);
    const error = await withSession(knex, async (session) => {
      listen(session);
      await session.transaction(async (inner) => {
        listen(inner);
        const builder = inner('people').insert({ name: 'Ann' });
        listen(builder);
        await builder;
      });
    }).catch((error) => error);

    expect(error).toMatchObject({
      code: '23505',
      constraint: 'people_name_unique',
      detail: 'Key (name)=(Ann) already exists.',
      table: 'people',
    });
    expect(seen).toHaveLength(4);
    expect(seen.every((other) => other === error)).toBe(true);
  });

  it('tells of a COMMIT that fails, as Knex does', async () => {
    const deferred = 'ALTER TABLE payments ADD UNIQUE (amount) DEFERRABLE INITIALLY DEFERRED';
    const run = async (way: Way) => {
      await ledger.reset();
      await ledger.admin.raw(deferred);
      const knex = ledger.connect();
      const seen: unknown[] = [];
      knex.on('query-error', (error, { sql, __knexTxId }) => seen.push([error.code, sql, typeof __knexTxId]));
      const failure = await way(knex, (trx) => trx('payments').insert([1, 2].map((id) => ({ person_id: id, amount: 7 })))).catch(
        (error) => error,
      );
      expect(failure).toMatchObject({ code: '23505' });
      return seen;
    };

    expect(await run(inSession)).toEqual([['23505', 'COMMIT;', 'string']]);
    expect(await run(plainly)).toEqual([['23505', 'COMMIT;', 'string']]);
  });
});

describe('when a listener throws', () => {
  it.each(['BEGIN;', 'insert', 'SAVEPOINT', 'RELEASE', 'COMMIT;', 'ROLLBACK'])('stores nothing and leaks nothing, at %s', async (at) => {
    const knex = ledger.connect({ pool: { min: 0, max: 1 }, log: { warn() {}, error() {} } });
    knex.on('query', ({ sql }) => {
      if (sql.startsWith(at)) throw new RangeError(`at ${at}`);
    });
    const work = withSession(knex, async (session) => {
      await insert(session, 'x');
      await session.transaction(async (inner) => insert(inner, 'y'));
      if (at === 'ROLLBACK') throw new Error('of the application');
    });

    await expect(work).rejects.toThrow(at === 'ROLLBACK' ? 'of the application' : `at ${at}`);
    expect(poolUsage(knex)).toMatchObject({ used: 0 });
    knex.removeAllListeners('query');
    expect(await knex('people').pluck('name')).toEqual(['Ann', 'Bob', 'Cid']);
  });
});

describe('when asyncStackTraces are on', () => {
  const firstPlaceIn = (stack: string | undefined) => stack?.match(/knex-errors\.test\.ts:\d+/)?.[0];
  const here = () => new Error().stack?.split('\n')[2];

  it.each(ways)('names the line that made a failing statement: %s', async (_name, way) => {
    const knex = ledger.connect({ asyncStackTraces: true });
    const places: unknown[] = [];
    const statements: ((trx: Knex) => unknown)[] = [
      (trx) => [places.push(firstPlaceIn(here())), trx('nothing')][1],
      (trx) => [places.push(firstPlaceIn(here())), trx.raw('selekt')][1],
      (trx) => [places.push(firstPlaceIn(here())), trx.select('*').from('nothing')][1],
      (trx) => [places.push(firstPlaceIn(here())), trx.schema.dropTable('nothing')][1],
      (trx) => trx.transaction(async (inner) => [places.push(firstPlaceIn(here())), inner('nothing')][1]),
    ];
    const errors: any[] = [];
    for (const statement of statements) await way(knex, statement).catch((error) => errors.push(error));

    expect(errors.map(({ stack }) => firstPlaceIn(stack))).toEqual(places);
    expect(new Set(places).size).toBe(statements.length);
  });
});

describe('when a statement takes longer than its timeout', () => {
  const timeoutError = { name: 'KnexTimeoutError', timeout: 20, sql: 'select pg_sleep(0.2)' };

  it.each(ways)('gives the error of Knex, stores nothing and destroys the connection: %s', async (_name, way) => {
    const knex = ledger.connect({ pool: { min: 0, max: 1 }, log: { warn() {} } });
    const run = async (trx: Knex) => {
      await insert(trx, 'x');
      await trx.raw('select pg_sleep(0.2)').timeout(20);
    };

    await expect(way(knex, run)).rejects.toMatchObject(timeoutError);
    await eventually(() => expect(poolUsage(knex)).toMatchObject({ used: 0 }));
    expect(await knex('people').pluck('name')).toEqual(['Ann', 'Bob', 'Cid']);
  });

  it.each(ways)(
    'gives the error of Knex and cancels it, with { cancel: true }: %s',
    async (_name, way) => {
      const knex = ledger.connect({ pool: { min: 0, max: 1 } });
      const pids: number[] = [];
      const run = async (trx: Knex) => {
        pids.push((await trx.raw('select pg_backend_pid() as pid')).rows[0].pid);
        await insert(trx, 'x');
        await trx.raw('select pg_sleep(10)').timeout(20, { cancel: true });
      };

      await expect(way(knex, run)).rejects.toMatchObject({ ...timeoutError, sql: 'select pg_sleep(10)' });
      await eventually(() => expect(poolUsage(knex)).toMatchObject({ used: 0 }));
      const [pid] = (await knex.raw('select pg_backend_pid() as pid')).rows.map((row: { pid: number }) => row.pid);
      expect(pids).toEqual([pid]);
      expect(await ledger.names()).toEqual(['Ann', 'Bob', 'Cid']);
    },
    5_000,
  );

  it('rolls back when the error of the cancelled statement is swallowed, and says so, however late that comes', async () => {
    const proxy = await startWireProxy(ledger.url);
    const knex = ledger.connect({ connection: proxy.url });
    let letPass = () => {};
    const held = new Promise<void>((resolve) => {
      letPass = resolve;
    });
    proxy.onBackend(({ type, text }) => (type === 'E' && text === '57014' ? held : undefined));
    const work = withSession(knex, async (session) => {
      await insert(session, 'x');
      const slow = session.raw('select pg_sleep(10)').timeout(20, { cancel: true });
      await slow.catch(() => void setImmediate(() => setImmediate(letPass)));
    });

    await expect(work).rejects.toMatchObject({ code: 'ERR_TRANSACTION_ABORTED', cause: { code: '57014' } });
    expect(await ledger.names()).toEqual(['Ann', 'Bob', 'Cid']);
    await knex.destroy();
    await proxy.close();
  }, 5_000);

  it('runs what comes after a cancelled statement in a savepoint, once that has been rolled back', async () => {
    await withSession(ledger.knex, async (session) => {
      const slow = session.transaction((inner) => inner.raw('select pg_sleep(10)').timeout(20, { cancel: true }) as never);
      await expect(slow).rejects.toMatchObject({ name: 'KnexTimeoutError' });
      await insert(session, 'after');
    });

    expect(await ledger.names()).toEqual(['Ann', 'Bob', 'Cid', 'after']);
  }, 5_000);

  it.each(ways)('passes when it is quick: %s', async (_name, way) => {
    expect(await way(ledger.knex, (trx) => trx('people').count().timeout(5_000))).toEqual([{ count: '3' }]);
  });
});

describe('when the transaction has failed', () => {
  it('names the first error as the cause of every one that follows from it (scenario 26)', async () => {
    const [first, ...later] = await withSession(ledger.knex, async (session) => {
      const errors: any[] = [];
      for (const table of ['nothing', 'people', 'people']) await session(table).catch((error) => errors.push(error));
      await session.transaction(async () => {}).catch((error) => errors.push(error));
      session.setRollbackOnly();
      return errors;
    });

    expect(first).toMatchObject({ code: '42P01' });
    expect(later.map(({ code }) => code)).toEqual(['25P02', '25P02', '25P02']);
    expect(later.every(({ cause }) => cause === first)).toBe(true);
    expect(first).not.toBeInstanceOf(SessionError);
  });
});
