import type { Knex } from 'knex';
import { Ledger, type Use } from './support/knex';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
// A migration that fails is logged.
const ledger = Ledger.forTests({ log: { warn() {}, error() {} } });

const raw: Use[] = [
  { name: 'raw', run: (trx) => trx.raw('select 1 as one') },
  { name: 'raw with bindings', run: (trx) => trx.raw('select name from people where id in (?, ?) order by id', [1, 2]) },
  { name: 'raw with one binding', run: (trx) => trx.raw('select name from people where id = ?', 2) },
  { name: 'raw with named bindings', run: (trx) => trx.raw('select :column: from people where id = :id', { column: 'name', id: 3 }) },
  { name: 'raw with identifiers', run: (trx) => trx.raw('select ?? from ?? where ?? = ?', ['name', 'people', 'people.id', 1]) },
  { name: 'raw with an escaped question mark', run: (trx) => trx.raw("select data \\? 'age' as has from people order by id") },
  {
    name: 'raw of several statements',
    run: async (trx) => (await trx.raw('select 1 as one; select 2 as two')).map((part: any) => part.rows),
  },
  { name: 'raw with options', run: (trx) => trx.raw('select 1, 2').options({ rowMode: 'array' }) },
  { name: 'raw that writes', run: (trx) => trx.raw('update people set balance = 0 returning id') },
  {
    name: 'raw in a builder',
    run: (trx) =>
      trx('people')
        .select(trx.raw('upper(??) as loud', ['name']))
        .orderBy('id'),
  },
  { name: 'raw wrapped', run: (trx) => trx.select(trx.raw('select max(balance) from people').wrap('(', ') as most')) },
  { name: 'raw that is empty', fails: true, run: (trx) => trx.raw('') },
  { name: 'raw that is no SQL', fails: true, run: (trx) => trx.raw('selekt') },
  { name: 'raw with too few bindings', fails: true, run: async (trx) => trx.raw('select ?, ?', [1]) },
  { name: 'raw as a prepared statement', run: (trx) => trx.raw('select ?::int as n', [1]).options({ name: 'prepared' }) },
  { name: 'fn.now', run: async (trx) => typeof (await trx.select(trx.fn.now()).from('people').first()).now },
  { name: 'fn.now with a precision', run: (trx) => trx.fn.now(3).toString() },
  { name: 'fn.uuid', run: (trx) => trx.select(trx.raw('pg_typeof(?) as type', [trx.fn.uuid()])) },
  { name: 'fn.uuidToBin and back', run: (trx) => trx.fn.binToUuid(trx.fn.uuidToBin('6b2c5f4e-0c52-4d7a-8f6e-1f2a3b4c5d6e')) },
  { name: 'ref', run: (trx) => String(trx.ref('people.id').as('x')) },
  { name: 'toString', run: (trx) => trx('people').where({ name: "O'Hara", id: 1 }).toString() },
  { name: 'toQuery', run: (trx) => (trx('people').insert({ name: 'x', data: { a: 1 } }) as any).toQuery() },
  { name: 'toSQL', run: (trx) => trx('people').where('id', 1).toSQL().sql },
  { name: 'toSQL().toNative()', run: (trx) => trx('people').where('id', 1).toSQL().toNative() },
  { name: 'raw.toSQL', run: (trx) => trx.raw('select ?', [1]).toSQL().sql },
  { name: 'schema.toSQL', run: (trx) => trx.schema.dropTable('notes').toSQL() },
];

const createNotes = (trx: Knex): Knex.SchemaBuilder =>
  trx.schema.createTable('notes', (table) => {
    table.increments();
    table.text('text').notNullable().index();
    table.integer('person_id').references('people.id').onDelete('cascade');
    table.timestamps(true, true);
  });

const schema: Use[] = [
  { name: 'createTable', run: createNotes },
  {
    name: 'hasTable and hasColumn',
    run: async (trx) => [await trx.schema.hasTable('people'), await trx.schema.hasColumn('people', 'x')],
  },
  {
    name: 'alterTable, and a read of the new column',
    run: async (trx) => {
      await trx.schema.alterTable('people', (table) => void table.text('note').defaultTo('-'));
      const notes = await trx('people').pluck('note');
      await trx.schema.alterTable('people', (table) => table.dropColumn('note'));
      return notes;
    },
  },
  {
    name: 'several steps in one builder',
    run: async (trx) => {
      await createNotes(trx)
        .alterTable('notes', (table) => table.renameColumn('text', 'body'))
        .raw("insert into notes (body) values ('a')");
      return trx('notes').pluck('body');
    },
  },
  {
    name: 'createView and a read of it',
    run: async (trx) => [await trx.schema.createView('rich', (view) => view.as(trx('people'))), await trx('rich').count()],
  },
  { name: 'createTable and dropTable', run: (trx) => createNotes(trx).dropTable('notes') },
  { name: 'createTableLike', run: (trx) => trx.schema.createTableLike('notes', 'people') },
  { name: 'schema.withSchema', run: (trx) => trx.schema.withSchema('public').hasTable('people') },
  { name: 'schema of the root knex with transacting', run: (trx, knex) => (createNotes(knex) as any).transacting(trx) },
  {
    name: 'createTable, and an error after it',
    fails: true,
    run: async (trx) => {
      await createNotes(trx);
      throw new Error('no');
    },
  },
  {
    name: 'createTable of what is there',
    fails: true,
    run: (trx) => trx.schema.createTable('people', (table) => void table.increments()),
  },
];

class Migrations {
  constructor(private readonly files: Record<string, Knex.Migration>) {}
  getMigrations = async () => Object.keys(this.files);
  getMigrationName = (name: string) => name;
  getMigration = async (name: string) => this.files[name] as Knex.Migration;
}

const migrationSource = new Migrations({
  notes: { up: (knex) => createNotes(knex), down: (knex) => knex.schema.dropTable('notes') },
  note: { up: (knex) => knex('notes').insert({ text: 'migrated' }), down: (knex) => knex('notes').del() },
});
const failingSource = new Migrations({
  notes: { up: (knex) => createNotes(knex), down: async () => {} },
  bad: { up: (knex) => knex('nothing').del(), down: async () => {} },
});
const seedSource = {
  getSeeds: async () => ['seed'],
  getSeed: async () => ({ seed: (knex: Knex) => knex('people').insert({ name: 'seeded' }) }),
};

const migrating: Use[] = [
  { name: 'migrate.latest', run: (trx) => trx.migrate.latest({ migrationSource }) },
  {
    name: 'migrate.latest, list, currentVersion and rollback',
    run: async (trx) => {
      await trx.migrate.latest({ migrationSource });
      const listed = await trx.migrate.list({ migrationSource });
      const seen = [
        listed.map((part: any[]) => part.length),
        await trx.migrate.currentVersion({ migrationSource }),
        await trx('notes').pluck('text'),
      ];
      return [...seen, await trx.migrate.rollback({ migrationSource })];
    },
  },
  {
    name: 'migrate.up and down',
    run: async (trx) => [await trx.migrate.up({ migrationSource }), await trx.migrate.down({ migrationSource })],
  },
  { name: 'seed.run', run: (trx) => trx.seed.run({ seedSource } as object) },
  {
    name: 'migrate.latest that fails',
    fails: true,
    run: (trx) => trx.migrate.latest({ migrationSource: failingSource }),
  },
];

describe('when a session runs raw SQL, it gives what knex.transaction() gives, for', () => ledger.comparesWithKnex(raw));
describe('when a session changes the schema, it does what knex.transaction() does, for', () => ledger.comparesWithKnex(schema));
describe('when migrations and seeds run in a session, they do what they do in knex.transaction(), for', () =>
  ledger.comparesWithKnex(migrating));
