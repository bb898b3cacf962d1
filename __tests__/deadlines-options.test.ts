import { type SessionOptions, sessionMiddleware, withSession } from 'express-knex-session';
import { openSite, rejection } from './support/deadlines';
import { mistaken } from './support/docs';
import { type Handler, insert, useLedger } from './support/ledger';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

const names = ['acquireTimeout', 'transactionTimeout', 'settleTimeout'] as const;
const LONGEST = 2 ** 31 - 1;
const expected = (name: string) =>
  `a number of milliseconds from 1 to ${LONGEST}${name === 'transactionTimeout' ? ', or 0 for no limit' : ''}`;

const wrong: [string, unknown, string][] = [
  ['a negative number', -1, '-1'],
  ['less than a millisecond', 0.5, '0.5'],
  ['NaN', Number.NaN, 'NaN'],
  ['Infinity', Number.POSITIVE_INFINITY, 'Infinity'],
  ['too much for a timer, which would fire at once', LONGEST + 1, String(LONGEST + 1)],
  ['a string, as of process.env', '5000', "'5000'"],
  ['a duration in words', '5s', "'5s'"],
  ['a bigint', 5000n, '5000'],
  ['null', null, 'null'],
  ['true', true, 'true'],
  ['an object', { seconds: 5 }, 'Object'],
  ['a Date', new Date(), 'Date'],
];

const answer: Handler = async (req, res) => {
  await insert(req, 'a');
  res.status(201).end();
};

describe.each(names)('%s', (name) => {
  it.each(wrong)('is refused when the middleware is made, if it is %s', (_what, value, shown) => {
    const message = `Expected \`${name}\` to be ${expected(name)}, got ${shown}.`;
    expect(() => sessionMiddleware(ledger.knex, { [name]: value } as SessionOptions)).toThrow(new TypeError(message));
  });

  it.each(wrong)('is refused by withSession() before anything runs, if it is %s', async (_what, value, shown) => {
    const work = jest.fn();
    const error = await rejection(withSession(ledger.knex, work, { [name]: value } as never));
    expect(error).toEqual(new TypeError(`Expected \`${name}\` to be ${expected(name)}, got ${shown}.`));
    expect(work).not.toHaveBeenCalled();
  });

  it.each([...wrong, ['undefined', undefined, 'undefined'] as const, ['a promise', Promise.resolve(1), 'Promise'] as const])(
    'refuses the statement by name, if the function of the request returns %s',
    async (_what, value, shown) => {
      const site = await openSite(ledger, answer, { [name]: () => mistaken(value) });
      expect((await site.get()).status).toBe(500);
      expect(site.errors).toHaveLength(1);
      expect(site.errors[0]).toBeInstanceOf(TypeError);
      expect(site.errors[0].message).toContain(`Expected \`${name}\` to return ${expected(name)}, got ${shown}.`);
      expect(poolUsage(ledger.knex).used).toBe(0);
      expect(site.sessions.stats()).toMatchObject({ open: 0, waiting: 0 });
    },
  );

  it('lets no success pass of who swallows that', async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a').catch(() => {});
        res.status(201).send('stored');
      },
      { [name]: () => -1 },
    );
    expect(await site.get()).toMatchObject({ status: 500, body: expect.not.stringContaining('stored') });
    expect(await ledger.stored()).toEqual([]);
  });

  it.each([1_000, 1_000.5, LONGEST])('takes %p, as a value and from a function', async (value) => {
    for (const option of [value, () => value]) {
      const site = await openSite(ledger, answer, { [name]: option });
      expect((await site.get()).status).toBe(201);
      await ledger.database.admin('notes').del();
    }
    await withSession(ledger.knex, (session) => session.raw('SELECT 1'), { [name]: value });
  });

  it('is not taken as a function by withSession(), which has no request', async () => {
    const error = await rejection(withSession(ledger.knex, async () => {}, mistaken({ [name]: () => 1_000 })));
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toContain(`Expected \`${name}\` to be ${expected(name)}, got a function`);
  });

  it('is named if it is misspelt', () => {
    const misspelt = name.replace('Timeout', 'timeout');
    expect(() => sessionMiddleware(ledger.knex, mistaken({ [misspelt]: 1 }))).toThrow(
      `Unknown option \`${misspelt}\`. Did you mean \`${name}\`?`,
    );
  });
});

it('0 means no limit for transactionTimeout only: nothing may wait without an end for a connection or for COMMIT', async () => {
  await withSession(ledger.knex, (session) => session.raw('SELECT 1'), { transactionTimeout: 0 });
  for (const name of ['acquireTimeout', 'settleTimeout']) {
    expect(() => sessionMiddleware(ledger.knex, { [name]: 0 })).toThrow(`Expected \`${name}\` to be a number of milliseconds from 1`);
  }
});

describe('onDisconnect', () => {
  it.each(['commit', '', true, null, 0])('is refused if it is %p', (value) => {
    expect(() => sessionMiddleware(ledger.knex, mistaken({ onDisconnect: value }))).toThrow(
      /^Expected `onDisconnect` to be 'rollback' or 'finish', got /,
    );
  });
});
