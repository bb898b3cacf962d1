import { EventEmitter } from 'node:events';
import { withSession } from 'express-knex-session';
import { comparable, inRequest, inSession, insert, Ledger, plainly, type Way } from './support/knex';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = Ledger.forTests();

const EVENTS = ['start', 'query', 'query-response', 'query-error'] as const;

type Emitter = { on(event: string, listener: (...values: any[]) => void): unknown };
type Heard = [event: string, sql: string | undefined, txid: string | undefined];

/** Writes down what an emitter of Knex's events tells from now on. */
function hear(emitter: Emitter, heard: Heard[] = []): Heard[] {
  for (const event of EVENTS) {
    emitter.on(event, (first: any, second: any) => {
      const told = event === 'query' ? first : event === 'start' ? undefined : second;
      heard.push([event, told?.sql, told?.__knexTxId]);
    });
  }
  return heard;
}

const sqlOf = (heard: Heard[]) => heard.filter(([event]) => event === 'query').map(([, sql]) => comparable(sql));

/** Statements on two levels; one fails, and its savepoint is rolled back. Everything is heard on every level. */
async function rehearse(way: Way, end: 'commits' | 'rolls back') {
  await ledger.reset();
  const knex = ledger.connect();
  const root = hear(knex);
  const level: Heard[] = [];
  const inner: Heard[] = [];
  const builder: Heard[] = [];
  const work = way(knex, async (trx) => {
    hear(trx, level);
    await insert(trx, 'before');
    const query = trx('people').orderBy('id');
    hear(query, builder);
    await query;
    await trx
      .transaction(async (savepoint) => {
        hear(savepoint, inner);
        await insert(savepoint, 'x');
        await insert(savepoint, 'Ann');
      })
      .catch(() => {});
    await trx.savepoint(async (savepoint) => insert(savepoint, 'y'));
    await insert(trx, 'after');
    if (end === 'rolls back') throw new RangeError('no');
  });
  await work.catch(() => {});
  // A session's BEGIN comes with its first statement, and so after that statement's `start`.
  const isBegin = ([, sql]: Heard) => sql === 'BEGIN;';
  const withoutBegin = (heard: Heard[]) => comparable(heard.filter((one) => !isBegin(one)).map(([event, sql]) => [event, sql]));
  const told = { root: withoutBegin(root), level: withoutBegin(level), inner: withoutBegin(inner), builder: withoutBegin(builder) };
  return { told, queries: { root: sqlOf(root), level: sqlOf(level) } };
}

describe.each(Object.entries({ inSession, inRequest }))('when someone listens: %s', (_name, way) => {
  it.each(['commits', 'rolls back'] as const)(
    'tells the root knex, a savepoint and a builder what knex.transaction() tells them, if it %s',
    async (end) => {
      const plain = await rehearse(plainly, end);
      const session = await rehearse(way, end);

      expect(session.told).toEqual(plain.told);
      expect(session.queries.root).toEqual(plain.queries.root);
      expect(plain.queries.root).toEqual(expect.arrayContaining(['BEGIN;', end === 'commits' ? 'COMMIT;' : 'ROLLBACK']));
    },
  );

  it('tells listeners on the session of BEGIN too, which those on a Knex.Transaction come too late for', async () => {
    const plain = await rehearse(plainly, 'commits');
    const session = await rehearse(way, 'commits');

    expect(plain.queries.level).not.toContain('BEGIN;');
    expect(session.queries.level).toEqual(['BEGIN;', ...plain.queries.level]);
  });
});

describe('when events are put together by their ids', () => {
  it('gives one id to all statements of the session, BEGIN and COMMIT included, and one to those of a savepoint', async () => {
    const knex = ledger.connect();
    const heard = hear(knex);
    await withSession(knex, async (session) => {
      await insert(session, 'a');
      await session.transaction(async (inner) => insert(inner, 'b'));
      await insert(session, 'c');
    });

    const queries = heard.filter(([event]) => event === 'query');
    const [session, inner] = [queries[0]?.[2], queries[2]?.[2]];
    expect(queries.map(([, sql, txid]) => [sql?.split(' ')[0], txid])).toEqual([
      ['BEGIN;', session],
      ['insert', session],
      ['SAVEPOINT', inner],
      ['insert', inner],
      ['RELEASE', inner],
      ['insert', session],
      ['COMMIT;', session],
    ]);
    expect([session, inner]).toEqual([expect.any(String), expect.any(String)]);
    expect(session).not.toBe(inner);
    expect(heard.every(([event, , txid]) => event === 'start' || txid === session || txid === inner)).toBe(true);
  });

  it('keeps the id after a savepoint, which a Knex.Transaction loses', async () => {
    const idsOf = async (way: Way) => {
      const knex = ledger.connect();
      const heard = hear(knex);
      await way(knex, async (trx) => {
        await trx.transaction(async () => {});
        await trx('people');
      });
      return heard.filter(([event]) => event === 'query').at(-2)?.[2];
    };

    expect(await idsOf(plainly)).toBeUndefined();
    expect(await idsOf(inSession)).toEqual(expect.any(String));
  });

  it('gives ids that no other session has', async () => {
    const ids = await Promise.all(
      Array.from({ length: 5 }, () =>
        withSession(ledger.knex, async (session) => {
          const heard = hear(session);
          await session('people');
          return heard.at(-1)?.[2];
        }),
      ),
    );
    expect(new Set(ids).size).toBe(5);
  });
});

describe('when two sessions run at once', () => {
  it('tells the listeners of one nothing of the other, and those on the root knex of both', async () => {
    const knex = ledger.connect();
    const root = hear(knex);
    const run = (name: string) =>
      withSession(knex, async (session) => {
        const heard = hear(session);
        const ofClient = hear(session.client);
        await insert(session, name);
        await session.transaction(async (inner) => inner('people').where({ name }));
        return [heard, ofClient];
      });
    const [one, other] = await Promise.all([run('x'), run('y')]);

    const expected = [
      'BEGIN;',
      expect.stringMatching(/^insert/),
      'SAVEPOINT id1;',
      expect.stringMatching(/^select/),
      'RELEASE SAVEPOINT id1;',
      'COMMIT;',
    ];
    const together = (heard: Heard[] | undefined) => comparable(heard?.filter(([event]) => event === 'query').map(([, sql]) => sql));
    expect([one, other].flat().map(together)).toEqual([expected, expected, expected, expected]);
    expect(sqlOf(root)).toHaveLength(12);
  });

  it('leaves no listener behind on the root knex, on its client or for later sessions', async () => {
    const knex = ledger.connect();
    knex.on('query', () => {});
    await withSession(knex, (session) => insert(session, 'first'));
    const emitters = [knex, knex.client] as EventEmitter[];
    const counts = () => emitters.map((emitter) => emitter.eventNames().map((event) => [event, emitter.listenerCount(event)]));
    const before = counts();

    for (let i = 0; i < 20; i++) {
      await withSession(knex, async (session) => {
        expect([session, session.client].map((emitter) => emitter.eventNames())).toEqual([[], []]);
        hear(session);
        session.client.on('query', () => {});
        session.once('anything', () => {});
        session.setMaxListeners(1);
        await session.transaction(async (inner) => {
          expect(inner.eventNames()).toEqual([]);
          hear(inner);
          await inner('people');
        });
      });
    }

    expect(counts()).toEqual(before);
    expect(knex.getMaxListeners()).toBe(EventEmitter.defaultMaxListeners);
  });
});

describe('when listeners come and go', () => {
  it('tells a listener on the root knex once, whether it came before the first session or after', async () => {
    const knex = ledger.connect();
    const early = hear(knex);
    await withSession(knex, (session) => session('people'));
    const late = hear(knex);
    await withSession(knex, (session) => session('people'));

    expect(sqlOf(early)).toEqual(['BEGIN;', 'select * from "people"', 'COMMIT;', 'BEGIN;', 'select * from "people"', 'COMMIT;']);
    expect(sqlOf(late)).toEqual(['BEGIN;', 'select * from "people"', 'COMMIT;']);
  });

  it('tells a listener that was taken off nothing more', async () => {
    const knex = ledger.connect();
    const heard: unknown[] = [];
    const listener = () => heard.push('root');
    knex.on('query', listener);
    await withSession(knex, async (session) => {
      const own = () => heard.push('session');
      session.on('query', own);
      await session('people');
      heard.length = 0;
      session.off('query', own);
      await session('people');
      session.once('query', own).on('query', own);
      session.removeAllListeners('query');
      await session('people');
      expect(heard).toEqual(['root', 'root']);
      knex.off('query', listener);
      await session('people');
    });

    expect(heard).toEqual(['root', 'root']);
  });

  it('has listeners once(), prependListener() and listenerCount(), as an EventEmitter', async () => {
    await withSession(ledger.knex, async (session) => {
      const heard: string[] = [];
      session.once('query', () => heard.push('once'));
      session.prependListener('query', () => heard.push('first'));
      expect(session.listenerCount('query')).toBe(2);
      await session('people');
      expect(heard).toEqual(['first', 'once', 'first']);
      expect(session.listenerCount('query')).toBe(1);
      const next = EventEmitter.once(session as never, 'query-response');
      await session.raw('select 1 as one');
      expect((await next)[0]).toMatchObject({ rows: [{ one: 1 }] });
    });
  });

  it('tells those on a knex with user params, and not those on the knex that it was made from', async () => {
    const knex = ledger.connect();
    const clone = knex.withUserParams({ tenant: 1 });
    const [root, own] = [hear(knex), hear(clone)];
    const plain = [hear(knex), hear(clone)];
    await withSession(clone, (session) => session('people'));
    const heard = [sqlOf(root), sqlOf(own)];
    for (const list of plain) list.length = 0;
    await clone.transaction(async (trx) => trx('people'));

    expect(heard).toEqual(plain.map(sqlOf));
  });
});
