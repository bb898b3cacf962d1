import { inspect } from 'node:util';
import { type Session, withSession } from 'express-knex-session';
import createKnex, { type Knex } from 'knex';
import { inRequest, inSession, Ledger, plainly, type Use } from './support/knex';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

// Before any Knex instance: Knex gives shortcuts to those that are made later only.
const builders = createKnex.QueryBuilder as unknown as { extend(name: string, method: (this: any, ...args: any[]) => unknown): void };
builders.extend('rich', function (than = 10) {
  return this.from('people').where('balance', '>', than).orderBy('id').pluck('name');
});

const ledger = Ledger.forTests();
const ways = Object.entries({ plainly, inSession, inRequest });

const extended: Use[] = [
  { name: 'a method of QueryBuilder.extend', run: (trx: any) => trx('people').rich(15) },
  { name: 'its shortcut', run: (trx: any) => trx.rich() },
  { name: 'its shortcut in a savepoint', run: (trx: any) => trx.transaction((inner: any) => inner.rich(25)) },
];

describe('when Knex has been extended, a session has what knex.transaction() has:', () => ledger.comparesWithKnex(extended));

const snake = (name: string) => name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
const camel = (name: string) => name.replace(/_(\w)/g, (_, letter: string) => letter.toUpperCase());
const camelRow = (row: any) =>
  row?.constructor === Object ? Object.fromEntries(Object.entries(row).map(([key, value]) => [camel(key), value])) : row;

const configured: Use[] = [
  { name: 'wrapIdentifier', run: (trx) => trx('payments').insert({ personId: 1, amount: 3 }).returning(['personId', 'amount']) },
  { name: 'wrapIdentifier in raw', run: (trx) => trx.raw('select ?? from payments', ['personId']) },
  { name: 'wrapIdentifier with a query context', run: (trx) => trx('payments').select('personId').queryContext({ raw: true }).toString() },
  {
    name: 'postProcessResponse',
    run: async (trx) => [await trx('payments').insert({ personId: 1, amount: 3 }), await trx('payments').first()],
  },
  { name: 'postProcessResponse in a savepoint', run: (trx) => trx.transaction(async (inner) => inner('people').first()) },
  { name: 'schema', run: (trx) => trx.schema.alterTable('payments', (table) => void table.text('someNote')) },
  { name: 'columnInfo', run: (trx) => trx('payments').columnInfo() },
  { name: 'migrate.currentVersion, which switches the processing off', run: (trx) => trx.migrate.currentVersion() },
];

describe('when Knex rewrites names and rows, a session does what knex.transaction() does, for', () => {
  let knex: Knex;
  beforeAll(() => {
    knex = ledger.connect({
      wrapIdentifier: (value, wrap, context) => (context?.raw ? wrap(value) : wrap(snake(value))),
      postProcessResponse: (result) => (Array.isArray(result) ? result.map(camelRow) : camelRow(result)),
    });
  });
  ledger.comparesWithKnex(configured, () => knex);
});

const parameters: Use[] = [
  { name: 'userParams', run: (trx) => trx.userParams },
  { name: 'userParams of a knex without them', run: (trx, knex) => [knex.userParams === trx.userParams, trx.userParams] },
  { name: "the client's configuration", run: (trx, knex) => trx.client.config === knex.client.config },
  {
    name: 'the dialect, driver and version',
    run: (trx, knex) => ['dialect', 'driver', 'version', 'logger'].map((name) => trx.client[name] === knex.client[name]),
  },
  { name: 'transacting', run: (trx, knex) => [trx.client.transacting, knex.client.transacting] },
];

describe('when Knex has user params, a session has what knex.transaction() has:', () => {
  let knex: Knex;
  beforeAll(() => {
    knex = ledger.connect().withUserParams({ tenant: 7 });
  });
  ledger.comparesWithKnex(parameters, () => knex);
  ledger.comparesWithKnex(parameters.slice(0, 2).map((use) => ({ ...use, name: `${use.name} (root)` })));

  it.each(ways)('sees params that were given after the first transaction: %s', async (_name, way) => {
    const own = ledger.connect();
    await way(own, (trx) => trx('people').first());
    own.userParams = { tenant: 8 };

    expect(await way(own, (trx) => trx.userParams)).toEqual({ tenant: 8 });
  });

  it('keeps them in a savepoint, where a Knex.Transaction loses them', async () => {
    const paramsIn = (trx: Knex) => trx.transaction(async (inner) => inner.userParams);

    expect(await plainly(knex, paramsIn)).toEqual({});
    expect(await inSession(knex, paramsIn)).toEqual({ tenant: 7 });
  });
});

describe('when a connection is given by hand', () => {
  it.each(ways)('refuses one that is not of this transaction: %s', async (_name, way) => {
    const foreign = await ledger.knex.client.acquireConnection();
    const work = way(ledger.knex, (trx) => trx('people').insert({ name: 'x' }).connection(foreign));

    await expect(work).rejects.toThrow('Invalid connection for transaction query.');
    await ledger.knex.client.releaseConnection(foreign);
    expect(await ledger.names()).toEqual(['Ann', 'Bob', 'Cid']);
  });

  it.each(ways)('takes its own: %s', async (_name, way) => {
    const count = await way(ledger.knex, async (trx) => {
      const connection = await trx.client.acquireConnection();
      await trx('people').insert({ name: 'x' }).connection(connection);
      await trx.client.releaseConnection(connection);
      return trx('people').count();
    });

    expect(count).toEqual([{ count: '4' }]);
  });
});

describe('when a session is looked at', () => {
  const looks: [string, (session: Session) => unknown, unknown][] = [
    ['is a function, as Knex is', (session) => typeof session, 'function'],
    ['is no promise', (session) => [(session as any).then, 'then' in session], [undefined, false]],
    ['has no JSON', (session) => JSON.stringify({ session }), '{}'],
    ['shows its context only, to those who enumerate', (session) => Object.keys(session), ['context']],
    ['is a transaction', (session) => session.isTransaction, true],
    ['is open', (session) => session.isCompleted(), false],
  ];

  it.each(looks)('%s', async (_name, look, expected) => {
    await withSession(ledger.knex, async (session) => {
      expect(look(session)).toEqual(expected);
      await session.transaction(async (inner) => expect(look(inner as Session)).toEqual(expected));
    });
  });

  it('is itself when it is awaited', async () => {
    await withSession(ledger.knex, async (session) => {
      expect((await session) === session).toBe(true);
    });
  });

  it.each([{}, { showHidden: true }, { depth: 5, getters: false }, { showProxy: true }])('can be printed, with %o', async (options) => {
    await withSession(ledger.knex, async (session) => {
      expect(inspect(session, options)).toContain('[Function');
      expect(String(session)).toEqual(expect.any(String));
      expect(Object.prototype.toString.call(session)).toBe('[object Function]');
    });
  });

  it('shares nothing that is set on it with the next', async () => {
    await withSession(ledger.knex, async (session: any) => {
      session.note = 1;
      session.userParams = { own: true };
      session.client.note = 1;
    });
    await withSession(ledger.knex, async (session: any) => {
      expect([session.note, session.userParams, session.client.note]).toEqual([undefined, {}, undefined]);
    });
    expect(ledger.knex.userParams).toEqual({});
  });
});
