import type { Knex } from 'knex';
import { insert, Ledger, type Use } from './support/knex';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = Ledger.forTests();

const failure = new RangeError('no');

/** What a promise became, for uses that go on after a failure. */
const settled = async (promise: PromiseLike<unknown>) => (await Promise.allSettled([promise]))[0];

// Opening a savepoint is the first statement of these, so it brings BEGIN with it.
const savepoints: Use[] = [
  { name: 'transaction(callback)', run: (trx) => trx.transaction(async (inner) => insert(inner, 'x').returning('name')) },
  {
    name: 'transaction(callback, config)',
    run: (trx) => trx.transaction(async (inner) => insert(inner, 'x'), { doNotRejectOnRollback: true }),
  },
  { name: 'savepoint(callback)', run: (trx) => trx.savepoint(async (inner) => insert(inner, 'x').returning('name')) },
  { name: 'a callback that runs nothing', run: (trx) => trx.transaction(async () => 'done') },
  { name: 'a callback that returns a builder', run: (trx) => trx.transaction((inner) => insert(inner, 'x').returning('name') as never) },
  {
    name: 'transaction() as a promise, committed',
    run: async (trx) => {
      const inner = await trx.transaction();
      await insert(inner, 'x');
      const completed = [inner.isCompleted()];
      await inner.commit('value');
      return [...completed, inner.isCompleted(), trx.isCompleted(), await inner.executionPromise];
    },
  },
  {
    name: 'transaction() as a promise, rolled back',
    run: async (trx) => {
      const inner = await trx.transaction();
      await insert(inner, 'x');
      await inner.rollback();
      return [inner.isCompleted(), trx.isCompleted(), await inner.executionPromise, await trx('people').count()];
    },
  },
  {
    name: 'transaction(null, config) as a promise, rolled back with an error',
    run: async (trx) => {
      const inner = await trx.transaction(null, { doNotRejectOnRollback: false });
      await insert(inner, 'x');
      const execution = settled(inner.executionPromise);
      await inner.rollback(failure);
      return [await execution, await trx('people').count()];
    },
  },
  {
    name: 'transaction(null, { doNotRejectOnRollback: false }), rolled back without an error',
    run: async (trx) => {
      const inner = await trx.transaction(null, { doNotRejectOnRollback: false });
      const execution = settled(inner.executionPromise);
      await inner.rollback();
      return execution;
    },
  },
  {
    name: 'a callback that throws',
    fails: true,
    run: (trx) => trx.transaction(async (inner) => Promise.reject([await insert(inner, 'x'), failure][1])),
  },
  {
    name: 'a callback that throws, caught outside (scenario 45)',
    run: async (trx) => {
      await insert(trx, 'before');
      const inner = await settled(trx.transaction(async (inner) => Promise.reject([await insert(inner, 'x'), failure][1])));
      await insert(trx, 'after');
      return inner;
    },
  },
  {
    name: 'a callback that throws synchronously',
    fails: true,
    run: (trx) =>
      trx.transaction(() => {
        throw failure;
      }),
  },
  {
    name: 'a callback that throws synchronously, caught outside',
    run: async (trx) => [
      await settled(
        trx.transaction(() => {
          throw failure;
        }),
      ),
      await insert(trx, 'after'),
    ],
  },
  {
    name: 'a statement that fails inside, caught outside',
    run: async (trx) => [
      await insert(trx, 'before'),
      await settled(trx.transaction((inner) => inner('nothing') as never)),
      await insert(trx, 'after'),
    ],
  },
  {
    name: 'a callback that commits by detached functions',
    run: (trx) =>
      trx.transaction((inner) => {
        insert(inner, 'x').returning('name').then(inner.commit).catch(inner.rollback);
      }),
  },
  {
    name: 'a callback that rolls back by detached functions',
    run: async (trx) => [
      await settled(
        trx.transaction((inner) => {
          insert(inner, 'Ann').then(inner.commit).catch(inner.rollback);
        }),
      ),
      await insert(trx, 'after'),
    ],
  },
  {
    name: 'a callback that rolls back by itself, without an error',
    run: async (trx) => [
      await trx.transaction(async (inner) => {
        await insert(inner, 'x');
        await inner.rollback();
        return 'ignored';
      }),
      await insert(trx, 'after'),
    ],
  },
  {
    name: 'a callback that rolls back by itself, with an error',
    run: async (trx) => settled(trx.transaction(async (inner) => void (await inner.rollback(failure)))),
  },
  {
    name: 'a callback that commits by itself, with a value',
    run: (trx) => trx.transaction(async (inner) => [await insert(inner, 'x'), await inner.commit('value')].length),
  },
  {
    name: 'rollback with something that is no error',
    run: async (trx) => settled(trx.transaction(async (inner) => void (await inner.rollback('a reason')))),
  },
  {
    name: 'three levels, the second rolled back',
    run: (trx) =>
      trx.transaction(async (one) => {
        await insert(one, 'one');
        const second = await settled(
          one.transaction(async (two) => {
            await insert(two, 'two');
            await two.transaction(async (three) => insert(three, 'three'));
            throw failure;
          }),
        );
        await insert(one, 'one again');
        return second;
      }),
  },
  {
    name: 'savepoints one after the other',
    run: async (trx) => {
      for (const name of ['x', 'Ann', 'y']) await settled(trx.transaction(async (inner) => insert(inner, name)));
      return trx('people').pluck('name');
    },
  },
  {
    name: 'savepoints at once: one after the other (scenario 47)',
    run: async (trx) => [
      await Promise.allSettled(['x', 'Ann', 'y'].map((name) => trx.transaction(async (inner) => insert(inner, name)))),
      await trx('people').pluck('name'),
    ],
  },
  {
    name: 'parentTransaction',
    run: (trx) => trx.transaction((one) => one.transaction(async (two) => [one.parentTransaction === trx, two.parentTransaction === one])),
  },
  {
    name: 'isTransaction',
    run: (trx, knex) => trx.transaction(async (inner) => [knex.isTransaction, trx.isTransaction, inner.isTransaction]),
  },
  {
    name: 'isCompleted and executionPromise in the callback',
    run: async (trx) => {
      let inner: Knex.Transaction | undefined;
      const result = await trx.transaction(async (opened) => {
        inner = opened;
        return `${opened.isCompleted()} ${opened.executionPromise instanceof Promise}`;
      });
      const execution = inner?.executionPromise;
      return [result, inner?.isCompleted(), await execution, execution === inner?.executionPromise];
    },
  },
  {
    name: 'transactionProvider',
    run: async (trx) => {
      const provide = trx.transactionProvider();
      const [one, other] = [await provide(), await provide()];
      await insert(one, 'x');
      await one.commit();
      return [one === other, one.isCompleted(), await one.executionPromise];
    },
  },
  {
    name: 'transactionProvider with a config',
    run: async (trx) => {
      const inner = await trx.transactionProvider({ doNotRejectOnRollback: false })();
      const execution = settled(inner.executionPromise);
      await inner.rollback();
      return execution;
    },
  },
  { name: 'transactionProvider that is never asked', run: (trx) => typeof trx.transactionProvider() },
  {
    name: 'then, catch and finally of transaction()',
    run: (trx) =>
      trx
        .transaction(async () => 1)
        .then(String)
        .catch(String)
        .finally(() => {}),
  },
  {
    name: 'transacting with a savepoint on a builder of the root knex',
    run: (trx, knex) => trx.transaction(async (inner) => knex('people').insert({ name: 'x' }).transacting(inner)),
  },
  {
    name: 'batchInsert in a savepoint',
    run: (trx) => trx.transaction((inner) => inner.batchInsert('people', [{ name: 'x' }, { name: 'y' }], 1)),
  },
  {
    name: 'schema in a savepoint',
    run: (trx) => trx.transaction(async (inner) => inner.schema.createTable('t', (table) => void table.increments())),
  },
  {
    name: 'SAVEPOINT by hand',
    run: async (trx) => {
      await insert(trx, 'x');
      await trx.raw('SAVEPOINT mine');
      await settled(insert(trx, 'Ann'));
      await trx.raw('ROLLBACK TO SAVEPOINT mine');
      await trx.raw('RELEASE SAVEPOINT mine');
      return trx('people').pluck('name');
    },
  },
  { name: 'withUserParams, which is refused', fails: true, run: async (trx) => trx.withUserParams({}) },
  {
    name: 'withUserParams of a savepoint, which is refused',
    fails: true,
    run: (trx) => trx.transaction(async (inner) => inner.withUserParams({})),
  },
  {
    name: 'an isolation level, which a savepoint cannot have',
    run: (trx) => trx.transaction(async () => 1, { isolationLevel: 'serializable' }),
  },
];

describe('when a session opens savepoints, it does what knex.transaction() does, for', () => ledger.comparesWithKnex(savepoints));
