import { isRetryable, type Session, type SessionOptions, sessionOptions, type WithSessionOptions, withSession } from 'express-knex-session';
import { mistaken } from './support/docs';
import { caught } from './support/knex';
import { failOnWarnings } from './support/warnings';
import { type Handler, sent, useBench } from './support/wire';

failOnWarnings();
const bench = useBench({}, { isolationLevel: ({ query }) => (query['level'] as never) ?? undefined });

/** A route with options of its own. */
const under =
  (options: SessionOptions, handler: Handler): Handler =>
  async (req, res, next) => {
    let refused: unknown;
    sessionOptions(options)(req, res, (error) => {
      refused = error;
    });
    if (refused) throw refused;
    return handler(req, res, next);
  };

const MODES = `
  select current_setting('transaction_isolation') as isolation, current_setting('transaction_read_only') as "readOnly",
    current_setting('transaction_deferrable') as deferrable`;
const modesOf = async (session: Session) => (await session.raw(MODES)).rows[0];
const usual = { isolation: 'read committed', readOnly: 'off', deferrable: 'off' };

describe.each<[options: WithSessionOptions, begin: string, modes: object]>([
  [{}, 'BEGIN;', {}],
  [{ isolationLevel: 'read uncommitted' }, 'BEGIN TRANSACTION ISOLATION LEVEL READ UNCOMMITTED;', { isolation: 'read uncommitted' }],
  [{ isolationLevel: 'repeatable read' }, 'BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ;', { isolation: 'repeatable read' }],
  [{ readOnly: true }, 'BEGIN TRANSACTION READ ONLY;', { readOnly: 'on' }],
  [{ readOnly: false }, 'BEGIN TRANSACTION READ WRITE;', {}],
  [{ deferrable: false }, 'BEGIN TRANSACTION NOT DEFERRABLE;', {}],
  [
    { isolationLevel: 'serializable', readOnly: true, deferrable: true },
    'BEGIN TRANSACTION ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE;',
    { isolation: 'serializable', readOnly: 'on', deferrable: 'on' },
  ],
])('when the modes are %j', (options, begin, modes) => {
  it('is what the transaction runs under, without a round trip or a message more', async () => {
    let seen: unknown;
    const handler: Handler = async (req, res) => {
      seen = await modesOf(req.session);
      res.end();
    };
    expect((await bench.answer(under(options, handler))).status).toBe(200);
    await bench.rest();
    expect(seen).toEqual({ ...usual, ...modes });
    expect(sent(bench.proxy)).toBe(`P(${begin}) B E P(${MODES}) B D E S Q(COMMIT;)`);
    expect(bench.proxy.roundTrips()).toBe(2);
  });

  it('is what withSession runs under, too, and nobody after it', async () => {
    expect(await withSession(bench.knex, modesOf, options)).toEqual({ ...usual, ...modes });
    await bench.rest();
    expect(await withSession(bench.knex, modesOf)).toEqual(usual);
  });
});

describe('when the first statement is not a plain one', () => {
  const collect = async (rows: AsyncIterable<unknown>) => {
    const all = [];
    for await (const row of rows) all.push(row);
    return all;
  };
  it.each<[string, (session: Session) => Promise<unknown>]>([
    ['a stream', (session) => collect(session.raw(MODES).stream())],
    ['several statements in one raw', async (session) => (await session.raw(`select 1; ${MODES}`))[1].rows],
    ['a named statement', async (session) => [(await session.raw(MODES).options({ name: 'modes' })).rows[0]]],
    ['a savepoint', (session) => session.transaction(async (savepoint) => [await modesOf(savepoint as Session)])],
  ])('begins in its modes all the same: it is %s', async (_first, run) => {
    const options = { isolationLevel: 'repeatable read', readOnly: true } as const;
    expect(await withSession(bench.knex, run, options)).toEqual([{ isolation: 'repeatable read', readOnly: 'on', deferrable: 'off' }]);
    await bench.rest();
    expect(bench.proxy.sql()[0]).toBe('BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY;');
  });
});

describe('when a mode is a function of the request', () => {
  it('is asked once for each transaction, at its first statement, and holds for this request only (64)', async () => {
    const asked: string[] = [];
    const readOnly = (req: { url: string }) => {
      asked.push(req.url);
      return req.url.endsWith('read');
    };
    const seen: (typeof usual)[] = [];
    const url = bench.route(
      under({ readOnly }, async (req, res) => {
        if (!req.url.includes('unused')) seen.push(await modesOf(req.session), await modesOf(req.session));
        res.end();
      }),
    );
    await Promise.all(['?unused', '?level=serializable', '?read'].map((query) => fetch(url + query)));
    expect(asked).toHaveLength(2);
    expect(seen).toHaveLength(4);
    expect(seen.filter((modes) => modes.readOnly === 'on')).toEqual(Array(2).fill({ ...usual, readOnly: 'on' }));
    expect(seen.filter((modes) => modes.readOnly === 'off')).toEqual(Array(2).fill({ ...usual, isolation: 'serializable' }));
  });

  it.each<[string, SessionOptions, RegExp]>([
    ['no level', { isolationLevel: () => mistaken('snapshot') }, /^Expected `isolationLevel` to return one of .*, got 'snapshot'\.$/],
    ['a word', { readOnly: () => mistaken('yes') }, /^Expected `readOnly` to return true or false, got 'yes'\.$/],
    ['a promise', { deferrable: async () => true } as never, /^Expected `deferrable` to return true or false, .*at once\.$/],
  ])('refuses the first statement by name, and a success that is sent all the same: %s', async (_case, options, message) => {
    let refused: any;
    const answer = await bench.answer(
      under(options, async (req, res) => {
        refused = await caught(req.session('items').insert({ name: 'a' }));
        res.status(201).end();
      }),
    );
    expect(refused).toBeInstanceOf(TypeError);
    expect(refused.message).toMatch(message);
    expect(answer.status).toBe(500);
    expect(bench.proxy.sql()).toEqual([]);
  });
});

describe('when a transaction is read-only', () => {
  const writes: [string, (session: Session) => PromiseLike<unknown>][] = [
    ['a write', (session) => session('items').insert({ name: 'a' })],
    ['a write after a read', (session) => session('items').then(() => session('items').insert({ name: 'a' }))],
    ['a write in a savepoint', (session) => session.transaction((savepoint) => savepoint('items').insert({ name: 'a' }))],
    ['a change of the schema', (session) => session.schema.createTable('made', (table) => table.text('a'))],
  ];
  it.each(writes)('refuses with 25006: %s (63)', async (_write, write) => {
    const answer = await bench.answer(under({ readOnly: true }, async (req, res) => write(req.session).then(() => res.end())));
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: '25006' }]);
    expect(await bench.stored()).toEqual([]);
  });

  it('sends no success if the refusal was swallowed', async () => {
    const answer = await bench.answer(
      under({ readOnly: true }, async (req, res) => {
        await caught(req.session('items').insert({ name: 'a' }));
        res.status(201).end();
      }),
    );
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: 'ERR_TRANSACTION_ABORTED', cause: { code: '25006' } }]);
  });

  // Nobody would wait for COMMIT's answer, and the unique name is checked there.
  it.each(['set transaction read write', 'SET LOCAL transaction_read_only TO off', '/* why */ Set Transaction_Read_Only = 0'])(
    'sends no success for what was not stored, if its first statement is %p',
    async (sql) => {
      await bench.database.admin('items').insert({ name: 'a' });
      const answer = await bench.answer(
        under({ readOnly: true }, async (req, res) => {
          await req.session.raw(sql);
          await req.session('items').insert({ name: 'a' });
          res.status(201).end();
        }),
      );
      expect(answer.status).toBe(500);
      expect(bench.errors).toMatchObject([{ code: '23505' }]);
      expect(await bench.stored()).toEqual(['a']);
    },
  );
});

describe('when routes have isolation levels of their own', () => {
  it.each([
    ['read committed', [0, 1]],
    ['repeatable read', [0, 0]],
  ] as const)('sees what others commit meanwhile, or not: %s (64)', async (isolationLevel, expected) => {
    const counts: unknown[] = [];
    const count = async (session: Session) => counts.push((await session('items')).length);
    await bench.answer(
      under({ isolationLevel }, async (req, res) => {
        await count(req.session);
        await bench.database.admin('items').insert({ name: 'a' });
        await count(req.session);
        res.end();
      }),
    );
    expect(counts).toEqual(expected);
  });

  it('refuses one of two that would not have seen each other: serializable', async () => {
    let left = 2;
    let arrive = () => {};
    const bothHaveRead = new Promise<void>((resolve) => {
      arrive = () => {
        if (--left === 0) resolve();
      };
    });
    const url = bench.route(async (req, res) => {
      const { length } = await req.session('items');
      arrive();
      await bothHaveRead;
      await req.session('items').insert({ name: `${length}, ${req.query['name']}` });
      res.status(201).end();
    });
    const answers = await Promise.all(['a', 'b'].map((name) => fetch(`${url}?level=serializable&name=${name}`)));
    expect(answers.map(({ status }) => status).sort()).toEqual([201, 500]);
    expect(bench.errors).toMatchObject([{ code: '40001' }]);
    expect(isRetryable(bench.errors[0])).toBe(true);
    expect(await bench.stored()).toHaveLength(1);
  });
});

describe('when the work goes on after a checkpoint', () => {
  it('begins in the same modes again', async () => {
    const options = { isolationLevel: 'repeatable read', deferrable: true } as const;
    const seen = await withSession(
      bench.knex,
      async (session) => {
        const before = await modesOf(session);
        await session.checkpoint();
        return [before, await modesOf(session)];
      },
      options,
    );
    expect(seen).toEqual(Array(2).fill({ isolation: 'repeatable read', readOnly: 'off', deferrable: 'on' }));
  });
});

describe('when the session is a savepoint in a Knex.Transaction', () => {
  it.each([{ isolationLevel: 'serializable' }, { readOnly: true }, { readOnly: false }, { deferrable: false }] as const)(
    'refuses modes by name, and leaves that transaction alone: %j',
    async (options) => {
      await bench.knex.transaction(async (outer) => {
        await outer('items').insert({ name: 'outer' });
        const work = withSession(
          outer,
          (session) =>
            session('items')
              .insert({ name: 'a' })
              .catch(() => 'swallowed'),
          options,
        );
        expect(await caught(work)).toMatchObject({ code: 'ERR_SESSION_OPTIONS', message: expect.stringContaining('in place of Knex') });
        expect(await withSession(outer, modesOf)).toEqual(usual);
      });
      expect(await bench.stored()).toEqual(['outer']);
    },
  );
});

describe('when withSession is given a mode that is none', () => {
  it.each<[WithSessionOptions, RegExp]>([
    [{ isolationLevel: mistaken('SERIALIZABLE') }, /^Expected `isolationLevel` to be one of '.*', got 'SERIALIZABLE'\.$/],
    [{ isolationLevel: mistaken(null) }, /got null\.$/],
    [{ readOnly: mistaken('true') }, /^Expected `readOnly` to be true or false, got 'true'\.$/],
    [{ readOnly: mistaken(() => true) }, /^Expected `readOnly` to be true or false, got a function/],
    [mistaken({ readonly: true }), /Did you mean `readOnly`\?$/],
    [mistaken({ transaction: false }), /^Unknown option `transaction`\./],
  ])('is a TypeError, before anything runs: %p', async (options, message) => {
    const work = jest.fn();
    const error = await caught(withSession(bench.knex, work, options));
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toMatch(message);
    expect(work).not.toHaveBeenCalled();
  });
});
