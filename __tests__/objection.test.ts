import express from 'express';
import { getSession, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { initialize, Model, type ModelClass, raw, ref, transaction, UniqueViolationError } from 'objection';
import { get, listen, post } from './support/http';
import { answerError, Ledger, UNCHANGED, type Use } from './support/knex';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

// Scenario 75.
failOnWarnings();
const ledger = Ledger.forTests();

class Payment extends Model {
  static override tableName = 'payments';
  static override relationMappings = () => ({
    person: { relation: Model.BelongsToOneRelation, modelClass: Person, join: { from: 'payments.person_id', to: 'people.id' } },
  });
  declare id: number;
  declare person_id: number;
  declare amount: number;
  declare person?: Person;
}

class Person extends Model {
  static override tableName = 'people';
  static override relationMappings = () => ({
    payments: { relation: Model.HasManyRelation, modelClass: Payment, join: { from: 'people.id', to: 'payments.person_id' } },
  });
  declare id: number;
  declare name: string;
  declare balance: number;
  declare payments?: Payment[];
}

const family = { name: 'Dan', payments: [{ amount: 1 }, { amount: 2 }] } as object;
const failure = new RangeError('no');

// Objection asks for a table's columns once, and remembers them.
beforeAll(async () => {
  await ledger.reset();
  for (const model of [Person, Payment]) await model.fetchTableMetadata({ knex: ledger.knex } as object);
});

const uses: Use[] = [
  { name: 'query', run: (trx) => Person.query(trx).orderBy('id') },
  { name: 'findById', run: (trx) => Person.query(trx).findById(2).throwIfNotFound() },
  { name: 'insert', run: (trx) => Person.query(trx).insert({ name: 'Dan' }) },
  { name: 'insert and fetch', run: (trx) => Person.query(trx).insertAndFetch({ name: 'Dan' }) },
  {
    name: 'insert of several, with returning',
    run: (trx) =>
      Person.query(trx)
        .insert([{ name: 'Dan' }, { name: 'Eve' }])
        .returning('*'),
  },
  { name: 'patch and fetch', run: (trx) => Person.query(trx).patchAndFetchById(1, { balance: 5 }) },
  { name: 'delete', run: (trx) => Person.query(trx).deleteById(3) },
  { name: 'raw and ref', run: (trx) => Person.query(trx).select(raw('upper(??) as loud', 'name'), ref('people.id')).orderBy('id') },
  { name: 'page', run: (trx) => Person.query(trx).orderBy('id').page(1, 2) },
  { name: 'resultSize', run: (trx) => Person.query(trx).resultSize() },
  { name: 'toKnexQuery', run: (trx) => Person.query(trx).where('id', 1).toKnexQuery() },
  { name: 'insertGraph', run: (trx) => Person.query(trx).insertGraph(family) },
  {
    name: 'insertGraph and withGraphFetched',
    run: async (trx) => [
      await Person.query(trx).insertGraph(family),
      await Person.query(trx).withGraphFetched('payments.person').orderBy('id'),
    ],
  },
  {
    name: 'withGraphJoined',
    run: async (trx) => [
      await Person.query(trx).insertGraph(family),
      await Person.query(trx).withGraphJoined('payments').orderBy('people.id').orderBy('payments.id'),
    ],
  },
  {
    name: 'upsertGraph',
    run: async (trx) => {
      const { id, payments = [] } = await Person.query(trx).insertGraph(family as Person);
      return Person.query(trx).upsertGraph({ id, balance: 9, payments: [{ id: payments[1]?.id, amount: 7 }, { amount: 8 }] } as object);
    },
  },
  { name: 'relatedQuery', run: (trx) => Person.relatedQuery('payments', trx).for(1).insert({ amount: 3 }) },
  {
    name: '$query and $relatedQuery',
    run: async (trx) => {
      const ann = await Person.query(trx).findById(1).throwIfNotFound();
      await ann.$query(trx).patch({ balance: 1 });
      await ann.$relatedQuery('payments', trx).insert({ amount: 4 });
      return [await ann.$relatedQuery('payments', trx), await ann.$fetchGraph('payments', { transaction: trx })];
    },
  },
  { name: 'bindKnex', run: (trx) => Person.bindKnex(trx).query().insertGraph(family) },
  { name: 'bindTransaction', run: (trx) => Person.bindTransaction(trx).query().insert({ name: 'Dan' }) },
  { name: 'a relation of a bound model', run: (trx) => Person.bindKnex(trx).query().withGraphFetched('payments').findById(1) },
  { name: 'transaction(trx, callback)', run: (trx) => transaction(trx, async (inner) => Person.query(inner).insert({ name: 'Dan' })) },
  {
    name: 'transaction(BoundModel, callback)',
    run: (trx) => transaction(Person.bindKnex(trx), async (Bound) => Bound.query().insert({ name: 'Dan' })),
  },
  {
    name: 'Model.transaction(trx, callback)',
    run: (trx) => Person.transaction(trx, async (inner) => Person.query(inner).insert({ name: 'Dan' })),
  },
  {
    name: 'Model.transaction(trx, callback) that fails',
    run: (trx) =>
      Person.transaction(trx, async (inner) => Promise.reject([await Person.query(inner).insert({ name: 'Dan' }), failure][1])).catch(
        String,
      ),
  },
  {
    name: 'transaction.start(trx)',
    run: async (trx) => {
      const inner = await transaction.start(trx);
      await Person.query(inner).insert({ name: 'Dan' });
      await inner.rollback();
      return Person.query(trx).resultSize();
    },
  },
  {
    name: 'Model.startTransaction(trx)',
    run: async (trx) => {
      const inner = await Person.startTransaction(trx);
      await Person.query(inner).insert({ name: 'Dan' });
      await inner.commit();
      return inner.isCompleted();
    },
  },
  { name: 'fetchTableMetadata', run: (trx) => class extends Person {}.fetchTableMetadata({ knex: trx } as object) },
  { name: 'initialize', run: (trx) => initialize(trx, [Person, Payment]) },
  { name: 'an error of a graph insert', fails: true, run: (trx) => Person.query(trx).insertGraph([{ name: 'Dan' }, { name: 'Ann' }]) },
  { name: 'an error of a row that is not there', fails: true, run: (trx) => Person.query(trx).findById(99).throwIfNotFound() },
];

describe('when Objection is given a session, it does what it does with knex.transaction(), for', () => ledger.comparesWithKnex(uses));

describe('when a model is bound to the root knex', () => {
  it('uses the session that it is given, and takes no other connection', async () => {
    const knex = ledger.connect({ pool: { min: 0, max: 1 }, acquireConnectionTimeout: 500 });
    class Rooted extends Person {}
    Rooted.knex(knex);
    expect(await Rooted.query().resultSize()).toBe(3);

    await withSession(knex, async (session) => {
      await Rooted.query(session).insertGraph(family);
      await Rooted.transaction(session, async (inner) => Rooted.query(inner).patch({ balance: 0 }));
      expect(await Rooted.bindKnex(session).query().resultSize()).toBe(4);
    });

    expect(await Rooted.query().resultSize()).toBe(4);
    expect(Rooted.knex()).toBe(knex);
  });

  it('takes no connection before the first query', async () => {
    await withSession(ledger.knex, async (session) => {
      Person.bindKnex(session);
      Person.query(session).where('id', 1);
      expect(session.outcome).toBe('unused');
      expect(poolUsage(ledger.knex)).toMatchObject({ used: 0 });
    });
  });
});

describe('when models are bound to several sessions', () => {
  /** The binding of each is made while the others are open. */
  const bindings = async (knexes: Knex[]) =>
    knexes.map((knex) => [Person, Payment].map((model: ModelClass<Model>) => model.bindKnex(knex)));

  it('never shares a bound model, nor with the root knex or a savepoint', async () => {
    const { knex } = ledger;
    const before = Person.bindKnex(knex);
    await withSession(knex, (one) =>
      withSession(knex, (other) =>
        one.transaction(async (inner) => {
          const all = [...(await bindings([knex, one, other, inner])), ...(await bindings([knex, one, other, inner]))];
          expect(new Set(all.map(([person]) => person)).size).toBe(4);
          expect(new Set(all.map(([, payment]) => payment)).size).toBe(4);
          expect(all.slice(4)).toEqual(all.slice(0, 4));
          expect(all.slice(0, 4).map(([person]) => person?.knex() as unknown)).toEqual([knex, one, other, inner]);
        }),
      ),
    );

    expect(Person.bindKnex(knex)).toBe(before);
    await withSession(knex, async (later) => expect(Person.bindKnex(later).knex()).toBe(later));
  });

  it('never shares one with the outer transaction that the session is made of', async () => {
    await ledger.knex.transaction(async (outer) => {
      const before = Person.bindKnex(outer);
      await withSession(outer, async (session) => {
        expect(Person.bindKnex(session)).not.toBe(before);
        expect(Person.bindKnex(session).knex() === (session as Knex)).toBe(true);
      });
      expect(Person.bindKnex(outer)).toBe(before);
    });
  });

  it('has relations bound to the same session', async () => {
    await withSession(ledger.knex, async (session) => {
      const relation = Person.bindKnex(session).getRelation('payments') as unknown as { relatedModelClass: typeof Model };
      expect(relation.relatedModelClass.knex() === (session as Knex)).toBe(true);
    });
  });
});

describe('when requests run at once', () => {
  it('keeps each in its own transaction', async () => {
    // All have written before one reads, and read before one commits.
    const arrived = { written: 0, read: 0 };
    const meet = async (at: keyof typeof arrived) => {
      arrived[at]++;
      await eventually(() => expect(arrived[at]).toBe(6));
    };
    const app = express()
      .use(sessionMiddleware(ledger.knex))
      .post('/:name', async (req, res) => {
        const session = getSession(req);
        const Bound = Person.bindKnex(session);
        await Bound.query().insertGraph({ name: req.params.name, payments: [{ amount: 1 }] } as object);
        await meet('written');
        const names = (await Person.query(session).withGraphFetched('payments').where('id', '>', 3)).map(({ name, payments }) => [
          name,
          payments?.length,
        ]);
        await meet('read');
        res.status(req.params.name.startsWith('bad') ? 400 : 201).json(names);
      })
      .use(sessionErrorHandler(), answerError);
    const server = await listen(app);

    const names = ['a', 'b', 'c', 'bad1', 'bad2', 'bad3'];
    const answers = await Promise.all(names.map((name) => post(`${server.url}/${name}`)));
    await server.close();

    expect(answers.map(({ body }) => JSON.parse(body))).toEqual(names.map((name) => [[name, 1]]));
    expect(answers.map(({ status }) => status)).toEqual([201, 201, 201, 400, 400, 400]);
    expect(await ledger.names()).toEqual([...UNCHANGED, 'a', 'b', 'c']);
    expect(poolUsage(ledger.knex)).toMatchObject({ used: 0 });
  });
});

describe('when a query of Objection fails in a request', () => {
  it('rolls back, and the error handlers get the error of Objection', async () => {
    let seen: unknown;
    const app = express()
      .use(sessionMiddleware(ledger.knex))
      .get('/', async (req, res) => {
        await Person.query(getSession(req)).insert({ name: 'Dan' });
        await Person.query(getSession(req)).insert({ name: 'Ann' });
        res.end();
      })
      .use(sessionErrorHandler(), (error: Error, req: express.Request, res: express.Response, next: express.NextFunction) => {
        seen = error;
        answerError(error, req, res, next);
      });
    const server = await listen(app);
    const answer = await get(server.url);
    await server.close();

    expect(answer.status).toBe(500);
    expect(seen).toBeInstanceOf(UniqueViolationError);
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it('names it as the cause when it was swallowed', async () => {
    const work = withSession(ledger.knex, async (session) => {
      await Person.query(session)
        .insert({ name: 'Ann' })
        .catch(() => {});
    });
    await expect(work).rejects.toMatchObject({ code: 'ERR_TRANSACTION_ABORTED', cause: { code: '23505' } });
  });

  it('refuses a model that is still bound to a session that has ended', async () => {
    const Bound = await withSession(ledger.knex, async (session) => [Person.bindKnex(session)]).then(([model]) => model);
    await expect(Bound?.query()).rejects.toMatchObject({ code: 'ERR_SESSION_CLOSED' });
  });
});
