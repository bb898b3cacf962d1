import { type Session, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { caught, inRequest, inSession, insert, Ledger, plainly, UNCHANGED, type Way } from './support/knex';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { startWireProxy } from './support/wire-proxy';

// What a session does on purpose in another way than a Knex.Transaction. Each test shows both.
failOnWarnings();
const ledger = Ledger.forTests();

const sessions = Object.entries({ inSession, inRequest });

/** Opens a transaction that ends by its own commit() or rollback() only. */
const openings: [string, (work: (trx: Knex.Transaction) => unknown) => Promise<unknown>][] = [
  ['inSession', (work) => withSession(ledger.knex, async (session) => work(session)).catch(() => {})],
  ['inRequest', (work) => inRequest(ledger.knex, work).catch(() => {})],
];
const byHand = async <T>(work: (trx: Knex.Transaction) => Promise<T> | T, knex = ledger.knex): Promise<T> => {
  const trx = await knex.transaction();
  trx.executionPromise.catch(() => {});
  return work(trx);
};

describe('when nothing is run', () => {
  const commandsOf = async (way: Way) => {
    const knex = ledger.connect();
    const commands: string[] = [];
    knex.on('query', ({ sql }) => commands.push(sql));
    await way(knex, () => {});
    return commands;
  };

  it.each(sessions)('sends nothing, where knex.transaction() sends BEGIN and COMMIT: %s', async (_name, way) => {
    expect(await commandsOf(plainly)).toEqual(['BEGIN;', 'COMMIT;']);
    expect(await commandsOf(way)).toEqual([]);
  });
});

describe('when commit() fails', () => {
  const violate = async (trx: Knex) => {
    await ledger.admin.raw('ALTER TABLE payments ADD UNIQUE (amount) DEFERRABLE INITIALLY DEFERRED');
    await trx('payments').insert([1, 2].map((id) => ({ person_id: id, amount: 7 })));
  };

  it('resolves with knex.transaction(); only executionPromise tells', async () => {
    await byHand(async (trx) => {
      await violate(trx);
      await trx.commit();
      await expect(trx.executionPromise).rejects.toMatchObject({ code: '23505' });
    });
  });

  it.each(openings)('rejects, and so does executionPromise: %s', async (_name, open) => {
    const seen = await new Promise<any[]>((resolve, reject) => {
      open(async (trx) => {
        await violate(trx);
        const error = await caught(trx.commit());
        resolve([error, await caught(trx.executionPromise), trx.isCompleted(), (trx as Session).outcome]);
      }).catch(reject);
    });

    expect(seen).toEqual([expect.objectContaining({ code: '23505' }), seen[0], true, 'rolled back']);
    expect(await ledger.admin('payments')).toEqual([]);
    expect(poolUsage(ledger.knex)).toMatchObject({ used: 0 });
  });

  it('lets rollback() resolve afterwards, as with knex.transaction(): all is rolled back', async () => {
    let answer: unknown;
    await withSession(ledger.knex, async (session) => {
      await violate(session);
      await caught(session.commit());
      answer = await caught(session.rollback());
    }).catch(() => {});

    expect(answer).toBe('no error');
    expect(await ledger.admin('payments')).toEqual([]);
  });
});

describe('when an error was swallowed, and commit() is called', () => {
  const swallow = async (trx: Knex) => {
    await insert(trx, 'x');
    await caught(insert(trx, 'Ann'));
  };

  it('is a success with knex.transaction(), and nothing is stored', async () => {
    await byHand(async (trx) => {
      await swallow(trx);
      await trx.commit();
      await trx.executionPromise;
    });
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it.each(openings)('rejects with the first error as its cause: %s', async (_name, open) => {
    let error: any;
    await open(async (trx) => {
      await swallow(trx);
      error = await caught(trx.commit());
    });

    expect(error).toMatchObject({ code: 'ERR_TRANSACTION_ABORTED', cause: { code: '23505' } });
    expect(await ledger.names()).toEqual(UNCHANGED);
    expect(poolUsage(ledger.knex)).toMatchObject({ used: 0 });
  });
});

describe('when rollback() fails', () => {
  it('rejects, where a Knex.Transaction resolves, and the connection is destroyed', async () => {
    const proxy = await startWireProxy(ledger.url);
    const connection = proxy.url;
    const cutAtRollback = () => proxy.onFrontend(({ text }) => (/^ROLLBACK/i.test(text) ? 'cut-before' : undefined));
    const knex = ledger.connect({ connection, pool: { min: 0, max: 1 }, log: { warn() {}, error() {} } });

    await byHand(async (trx) => {
      await insert(trx, 'x');
      cutAtRollback();
      await trx.rollback();
    }, knex);
    proxy.onFrontend(undefined);

    let answer: unknown;
    await withSession(knex, async (session) => {
      await insert(session, 'x');
      cutAtRollback();
      answer = await caught(session.rollback());
    }).catch(() => {});
    expect(answer).toBeInstanceOf(Error);
    proxy.onFrontend(undefined);

    await eventually(() => expect(poolUsage(knex)).toMatchObject({ used: 0 }));
    expect(await knex('people').pluck('name')).toEqual(UNCHANGED);
    await knex.destroy();
    await proxy.close();
  });
});

describe('when it has ended', () => {
  it.each([
    ['commit', 'session.commit() has ended it'],
    ['rollback', 'session.rollback() has ended it'],
  ] as const)('refuses a statement after %s(), by a name and a reason', async (end, reason) => {
    const plain = await byHand(async (trx) => [await trx[end](), await caught(trx('people'))][1]);
    let error: any;
    await withSession(ledger.knex, async (session) => {
      await insert(session, 'x');
      await session[end]();
      error = await caught(session('people'));
    });

    expect(plain).toMatchObject({ message: 'Transaction query already complete, run with DEBUG=knex:tx for more info' });
    expect(error).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining(reason) });
    expect(await ledger.names()).toEqual(end === 'commit' ? [...UNCHANGED, 'x'] : UNCHANGED);
  });

  const ends = [
    ['commit', 'commit', 'no error'],
    ['rollback', 'rollback', 'no error'],
    ['commit', 'rollback', expect.objectContaining({ code: 'ERR_SESSION_CLOSED' })],
    ['rollback', 'commit', expect.objectContaining({ code: 'ERR_SESSION_CLOSED' })],
  ] as const;

  it.each(ends)('answers %s() and then %s(), which Knex lets pass', async (first, second, expected) => {
    const endTwice = async (trx: Knex.Transaction) => {
      await insert(trx, 'x');
      await trx[first]();
      return caught(trx[second]());
    };
    expect(await byHand(endTwice)).toBe('no error');
    await ledger.reset();
    let answer: unknown;
    await withSession(ledger.knex, async (session) => {
      answer = await endTwice(session);
    });

    expect(answer).toEqual(expected);
    expect(await ledger.names()).toEqual(first === 'commit' ? [...UNCHANGED, 'x'] : UNCHANGED);
  });
});

describe('when a raw statement ends the transaction', () => {
  const commands = ['COMMIT', 'commit;', ' ROLLBACK', 'END', 'ABORT', 'BEGIN', 'START TRANSACTION', "PREPARE TRANSACTION 'x'"];

  it('goes through with knex.transaction(), and what follows is stored whatever happens', async () => {
    await plainly(ledger.knex, async (trx) => {
      await trx.raw('ROLLBACK');
      await insert(trx, 'x');
      throw new RangeError();
    }).catch(() => {});
    expect(await ledger.names()).toEqual([...UNCHANGED, 'x']);
  });

  it.each(commands)('is refused by name, and nothing is stored: %s (scenario 77)', async (command) => {
    const work = withSession(ledger.knex, async (session) => {
      await insert(session, 'x');
      await expect(session.raw(command)).rejects.toMatchObject({ code: 'ERR_TRANSACTION_CONTROL' });
      await insert(session, 'y').catch(() => {});
    });

    await expect(work).rejects.toMatchObject({ code: 'ERR_TRANSACTION_CONTROL' });
    expect(await ledger.names()).toEqual(UNCHANGED);
  });

  it('is refused in a savepoint as well', async () => {
    const work = withSession(ledger.knex, async (session) => {
      await insert(session, 'x');
      await session.transaction(async (inner) => inner.raw('COMMIT')).catch(() => {});
    });

    await expect(work).rejects.toMatchObject({ code: 'ERR_TRANSACTION_CONTROL' });
    expect(await ledger.names()).toEqual(UNCHANGED);
  });
});

describe('when it is taken for a pool or a login session', () => {
  const refused: [string, string, (session: any) => unknown][] = [
    ['destroy', 'ERR_SESSION_DESTROY', (session) => session.destroy()],
    ['destroy with a callback', 'ERR_SESSION_DESTROY', (session) => session.destroy(() => {})],
    ['initialize', 'ERR_SESSION_DESTROY', (session) => session.initialize()],
    ['client.destroy', 'ERR_SESSION_DESTROY', (session) => session.client.destroy()],
    ['context.destroy', 'ERR_SESSION_DESTROY', (session) => session.context.destroy()],
    ['client.initializePool', 'ERR_SESSION_DESTROY', (session) => session.client.initializePool()],
    ['save', 'ERR_NOT_A_LOGIN_SESSION', (session) => session.save(() => {})],
    ['regenerate', 'ERR_NOT_A_LOGIN_SESSION', (session) => session.regenerate(() => {})],
    ['reload', 'ERR_NOT_A_LOGIN_SESSION', (session) => session.reload(() => {})],
    ['touch', 'ERR_NOT_A_LOGIN_SESSION', (session) => session.touch()],
    ['cookie', 'ERR_NOT_A_LOGIN_SESSION', (session) => session.cookie.maxAge],
  ];

  it.each(refused)('refuses %s by name, and the pool lives (scenario 76)', async (_name, code, use) => {
    await withSession(ledger.knex, async (session) => {
      await insert(session, 'x');
      expect(() => use(session)).toThrow(expect.objectContaining({ code }));
      await session.transaction(async (inner) => expect(() => use(inner)).toThrow(expect.objectContaining({ code })));
      await insert(session, 'y');
    });
    expect(await ledger.knex('people').pluck('name')).toEqual([...UNCHANGED, 'x', 'y']);
  });
});

describe('when transaction() is given a configuration only', () => {
  it('opens a savepoint, where a Knex.Transaction takes it for the callback', async () => {
    const open = async (trx: Knex) => {
      const inner = await trx.transaction({ doNotRejectOnRollback: true });
      await insert(inner, 'x');
      await inner.commit();
    };

    await expect(plainly(ledger.knex, open)).rejects.toThrow('container is not a function');
    await inSession(ledger.knex, open);
    expect(await ledger.names()).toEqual([...UNCHANGED, 'x']);
  });
});

describe('when a savepoint is given an isolation level', () => {
  const none = { isolationLevel: 'none' as never };

  it('ignores it, as PostgreSQL has none for savepoints; Knex ignores it too, but refuses one that there is not', async () => {
    await expect(plainly(ledger.knex, (trx) => trx.transaction(async () => {}, none))).rejects.toThrow('Invalid isolationLevel');
    await inSession(ledger.knex, (trx) => trx.transaction(async (inner) => insert(inner, 'x'), none));
    expect(await ledger.names()).toEqual([...UNCHANGED, 'x']);
  });
});
