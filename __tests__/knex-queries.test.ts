import { Ledger, type Use } from './support/knex';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = Ledger.forTests();

const reading: Use[] = [
  { name: 'a call with a table', run: (trx) => trx('people').orderBy('id') },
  { name: 'a call with an alias', run: (trx) => trx('people as a').select('a.name').orderBy('a.id') },
  { name: 'a call with an object of aliases', run: (trx) => trx({ a: 'people' }).select('a.name').orderBy('a.id') },
  { name: 'a call with options', run: (trx) => trx('people', { only: true }).select('name').orderBy('id') },
  { name: 'a call with a raw table', run: (trx) => trx(trx.raw('people a')).select('a.name').orderBy('a.id') },
  { name: 'a call with a subquery', run: (trx) => trx(((from: any) => from.from('people').max('balance as most').as('a')) as any) },
  { name: 'a typed call', run: (trx) => trx<{ id: number; name: string }>('people').where('id', 1).select('name') },
  { name: 'select and from', run: (trx) => trx.select('name').from('people').orderBy('id') },
  { name: 'column and columns', run: (trx) => trx.column('id').columns(['name']).from('people').orderBy('id') },
  { name: 'from and where', run: (trx) => trx.from('people').where('balance', '>', 10).orderBy('id') },
  { name: 'where first', run: (trx) => trx.where({ name: 'Bob' }).from('people').first() },
  { name: 'whereIn', run: (trx) => trx.whereIn('id', [1, 3]).from('people').pluck('name') },
  { name: 'whereNull', run: (trx) => trx.whereNull('data').from('people').pluck('name') },
  { name: 'whereBetween', run: (trx) => trx.whereBetween('balance', [15, 25]).from('people').pluck('name') },
  { name: 'whereRaw', run: (trx) => trx.whereRaw('balance % ? = 0', [20]).from('people').pluck('name') },
  { name: 'whereJsonPath', run: (trx) => trx('people').whereJsonPath('data', '$.age', '>', 40).pluck('name') },
  { name: 'jsonExtract', run: (trx) => trx('people').jsonExtract('data', '$.age', 'age').where('id', 1) },
  { name: 'distinct', run: (trx) => trx.distinct('balance').from('people').orderBy('balance') },
  { name: 'fromRaw', run: (trx) => trx.fromRaw('people').count() },
  { name: 'withSchema', run: (trx) => trx.withSchema('public').from('people').pluck('name') },
  { name: 'table', run: (trx) => trx.table('people').max('balance') },
  {
    name: 'with',
    run: (trx) =>
      trx
        .with('rich', trx('people').where('balance', '>', 10))
        .from('rich')
        .pluck('name'),
  },
  {
    name: 'withRecursive',
    run: (trx) => trx.withRecursive('n', trx.raw('select 1 as i union all select i + 1 from n where i < 3')).from('n').pluck('i'),
  },
  { name: 'count', run: (trx) => trx.count('* as n').from('people') },
  { name: 'min, max, sum and avg', run: (trx) => trx.min('balance').max('balance').sum('balance').avg('balance').from('people') },
  { name: 'first', run: (trx) => trx.first('name').from('people').orderBy('id', 'desc') },
  { name: 'first of nothing', run: (trx) => trx('people').where('id', 99).first() },
  { name: 'pluck', run: (trx) => trx.pluck('name').from('people').orderBy('id') },
  { name: 'groupBy and having', run: (trx) => trx('people').select('data').groupBy('data').having(trx.raw('count(*)'), '>', 1) },
  { name: 'limit and offset', run: (trx) => trx('people').orderBy('id').limit(1).offset(1) },
  { name: 'a join', run: (trx) => trx('payments').join('people', 'people.id', 'payments.person_id').select('name') },
  { name: 'a left join', run: (trx) => trx('people as a').leftJoin('payments as e', 'a.id', 'e.person_id').orderBy('a.id') },
  { name: 'union', run: (trx) => trx('people').select('id').union(trx('payments').select('id')).orderBy('id') },
  {
    name: 'a subquery',
    run: (trx) => trx('people').where('balance', trx('people').max('balance')).pluck('name'),
  },
  {
    name: 'a subquery by function',
    run: (trx) => trx('people').whereIn('id', (query) => query.from('people').select('id').where('id', '<', 3)),
  },
  { name: 'forUpdate', run: (trx) => trx('people').where('id', 1).forUpdate().skipLocked().first() },
  { name: 'modify', run: (trx) => trx('people').modify((query, id) => void query.where({ id }), 2) },
  { name: 'clone', run: (trx) => trx('people').where('id', 1).clone().first() },
  { name: 'queryBuilder()', run: (trx) => trx.queryBuilder().from('people').count() },
  { name: 'no table at all', run: (trx) => trx.select(trx.raw('1 as one')) },
  { name: 'ref', run: (trx) => trx('people as a').select(trx.ref('a.name').as('n')).orderBy(trx.ref('id').withSchema('a')) },
  { name: 'columnInfo', run: (trx) => trx('people').columnInfo() },
  { name: 'columnInfo of one column', run: (trx) => trx('people').columnInfo('name') },
  { name: 'await of the same builder twice', run: async (trx) => [await trx('people').count(), await trx('people').count()] },
  {
    name: 'then, catch and finally',
    run: (trx) =>
      trx('people')
        .pluck('name')
        .then(String)
        .catch(String)
        .finally(() => {}),
  },
  {
    name: 'asCallback',
    run: (trx) =>
      new Promise((done) =>
        trx('people')
          .pluck('name')
          .asCallback((...values: unknown[]) => done(values)),
      ),
  },
];

const writing: Use[] = [
  { name: 'insert', run: (trx) => trx('people').insert({ name: 'Dan' }) },
  { name: 'insert first', run: (trx) => trx.insert({ name: 'Dan' }).into('people') },
  { name: 'insert of several, with returning', run: (trx) => trx('people').insert([{ name: 'Dan' }, { name: 'Eve' }], ['id', 'name']) },
  { name: 'insert with returning()', run: (trx) => trx('people').insert({ name: 'Dan' }).returning('id') },
  { name: 'returning *', run: (trx) => trx('people').where('id', 1).update({ balance: 5 }, '*') },
  {
    name: 'insert from a select',
    run: (trx) => trx(trx.raw('payments (person_id, amount)')).insert(trx('people').select('id', 'balance')),
  },
  { name: 'update', run: (trx) => trx('people').where('id', '>', 1).update({ balance: 0 }) },
  {
    name: 'update with raw and ref',
    run: (trx) => trx('people').update({ balance: trx.raw('?? * ?', ['balance', 2]), name: trx.ref('name') }),
  },
  { name: 'delete', run: (trx) => trx('people').where('id', 1).del() },
  { name: 'delete first', run: (trx) => trx.where('id', 1).delete().from('people') },
  { name: 'increment and decrement', run: (trx) => trx('people').where('id', 1).increment('balance', 3).decrement('balance', 1) },
  { name: 'truncate', run: (trx) => trx('payments').truncate() },
  { name: 'onConflict().ignore()', run: (trx) => trx('people').insert({ name: 'Ann', balance: 1 }).onConflict('name').ignore() },
  {
    name: 'onConflict().merge()',
    run: (trx) => trx('people').insert({ name: 'Ann', balance: 1 }).onConflict('name').merge(['balance']).returning('balance'),
  },
  {
    name: 'jsonSet',
    run: (trx) =>
      trx('people')
        .where('id', 1)
        .update({ data: trx.jsonSet('data', '$.age', '42') }),
  },
  {
    name: 'an insert of a json value',
    run: (trx) =>
      trx('people')
        .insert({ name: 'Dan', data: { a: [1] } })
        .returning('data'),
  },
  {
    name: 'a write and a read of it',
    run: async (trx) => [await trx('people').insert({ name: 'Dan' }), await trx('people').pluck('name')],
  },
  {
    name: 'statements issued together',
    run: (trx) => Promise.all(['x', 'y'].map((name) => trx('people').insert({ name }).returning('id'))),
  },
  { name: 'batchInsert', run: (trx) => trx.batchInsert('people', [{ name: 'Dan' }, { name: 'Eve' }, { name: 'Fay' }], 2) },
  {
    name: 'batchInsert with returning',
    run: (trx) => trx.batchInsert<any>('people', [{ name: 'Dan' }, { name: 'Eve' }], 1).returning('id'),
  },
  { name: 'batchInsert with transacting', run: (trx, knex) => (knex.batchInsert('people', [{ name: 'Dan' }]) as any).transacting(trx) },
  { name: 'batchInsert that fails', fails: true, run: (trx) => trx.batchInsert('people', [{ name: 'Dan' }, { name: 'Ann' }], 1) },
  {
    name: 'batchInsert that fails and is caught',
    run: (trx) => trx.batchInsert('people', [{ name: 'Dan' }, { name: 'Ann' }], 1).catch(String),
  },
  { name: 'batchInsert of no array', fails: true, run: (trx) => trx.batchInsert('people', {} as never) },
  { name: 'transacting on a builder of the root knex', run: (trx, knex) => knex('people').insert({ name: 'Dan' }).transacting(trx) },
  {
    name: 'transacting on a raw of the root knex',
    run: (trx, knex) => knex.raw("update people set name = name || '!'").transacting(trx),
  },
  { name: 'transacting as a shortcut', run: (trx, knex) => (knex as any).transacting(trx).insert({ name: 'Dan' }).into('people') },
];

const failing: Use[] = [
  { name: 'a unique violation', fails: true, run: (trx) => trx('people').insert({ name: 'Ann' }) },
  { name: 'a check violation', fails: true, run: (trx) => trx('payments').insert({ person_id: 1, amount: 0 }) },
  { name: 'a foreign key violation', fails: true, run: (trx) => trx('payments').insert({ person_id: 99, amount: 1 }) },
  { name: 'a table that is not there', fails: true, run: (trx) => trx('nothing') },
  { name: 'an error after a write', fails: true, run: async (trx) => [await trx('people').del(), await trx('nothing')] },
  {
    name: 'an error of the application',
    fails: true,
    run: async (trx) => Promise.reject(new RangeError(`after ${await trx('people').del()}`)),
  },
  { name: 'an undefined binding', fails: true, run: (trx) => trx('people').where('name', undefined as never) },
  { name: 'an unknown method', fails: true, run: (trx) => (trx('people') as any).whereSomehow() },
  { name: 'a where without a table', fails: true, run: (trx) => trx.where('id', 1) },
];

describe('when a session reads, it gives what knex.transaction() gives, for', () => ledger.comparesWithKnex(reading));
describe('when a session writes, it stores what knex.transaction() stores, for', () => ledger.comparesWithKnex(writing));
describe('when a statement fails in a session, the error is that of knex.transaction(), for', () => ledger.comparesWithKnex(failing));
