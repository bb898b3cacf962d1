import { failOnWarnings } from './support/warnings';
import { sent, useBench } from './support/wire';

failOnWarnings();

const COMMIT = 'Q(COMMIT;)';

describe('when a request runs its statements on a warm connection', () => {
  const bench = useBench();

  it('sends nothing if there is no statement (1)', async () => {
    const answer = await bench.answer((_req, res) => res.json('hello'));

    expect(answer).toMatchObject({ status: 200, body: '"hello"' });
    expect(bench.proxy.roundTrips()).toBe(0);
    expect(bench.proxy.frontend).toEqual([]);
  });

  it('sends nothing if the handler throws before any statement (2)', async () => {
    const answer = await bench.answer(() => {
      throw new Error('too early');
    });

    expect(answer.status).toBe(500);
    expect(bench.proxy.frontend).toEqual([]);
  });

  it('sends nothing for a builder that is never awaited', async () => {
    await bench.answer((req, res) => {
      req.session('items').where({ name: 'a' });
      res.end();
    });

    expect(bench.proxy.frontend).toEqual([]);
  });

  it('makes two round trips for one SELECT: BEGIN with it, then COMMIT', async () => {
    const answer = await bench.answer(async (req, res) => res.json(await req.session.select(1)));

    expect(answer.status).toBe(200);
    expect(bench.proxy.roundTrips()).toBe(2);
    expect(sent(bench.proxy)).toBe(`P(BEGIN;) B E P(select 1) B D E S ${COMMIT}`);
  });

  it('makes three round trips for a SELECT and an INSERT', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').select();
      await req.session('items').insert({ name: 'a' });
      res.status(201).end();
    });

    expect(answer.status).toBe(201);
    expect(bench.proxy.roundTrips()).toBe(3);
    expect(sent(bench.proxy)).toBe(
      `P(BEGIN;) B E P(select * from "items") B D E S P(insert into "items" ("name") values ($1)) B D E S ${COMMIT}`,
    );
    expect(await bench.stored()).toEqual(['a']);
  });

  it('makes two round trips for a statement that is rolled back', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      res.status(409).end();
    });

    expect(answer.status).toBe(409);
    expect(bench.proxy.roundTrips()).toBe(2);
    expect(bench.proxy.sql().at(-1)).toBe('ROLLBACK');
    expect(await bench.stored()).toEqual([]);
  });

  it('makes one round trip for each of ten statements that were issued together, and one for COMMIT', async () => {
    await bench.answer(async (req, res) => {
      await Promise.all(Array.from({ length: 10 }, (_, i) => req.session('items').insert({ name: `${i}` })));
      res.end();
    });

    expect(bench.proxy.roundTrips()).toBe(11);
    expect(bench.proxy.sql().filter((sql) => sql === 'BEGIN;')).toHaveLength(1);
    expect(bench.proxy.connections()).toBe(1);
  });

  it('sends the next request on the same connection, without anything to clean it', async () => {
    const url = (req: { session: import('express-knex-session').Session }) => req.session.select(1);
    for (let i = 0; i < 3; i++) await bench.answer(async (req, res) => res.json(await url(req)));

    expect(bench.proxy.roundTrips()).toBe(6);
    expect(new Set(bench.proxy.frontend.map(({ connection }) => connection)).size).toBe(1);
  });
});
