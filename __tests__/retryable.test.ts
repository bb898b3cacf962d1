import { CommitUnknownError, isRetryable, type Session, SessionError, TransactionAbortedError, withSession } from 'express-knex-session';
import { Model } from 'objection';
import { openSite, rejection } from './support/deadlines';
import { insert, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const ledger = useLedger();

class Note extends Model {
  static override readonly tableName = 'notes';
  declare id: string;
  declare at_commit: string | null;
}

beforeEach(() => ledger.database.admin('notes').insert([{ id: 'one' }, { id: 'two' }]));

const serializable = (session: Session) => session.raw('SET TRANSACTION ISOLATION LEVEL SERIALIZABLE');

/** Two units of work, each of which has read what the other is about to change. */
async function conflict(change: (session: Session) => PromiseLike<unknown>): Promise<any> {
  return withSession(ledger.knex, async (session) => {
    await serializable(session);
    await session('notes').select();
    await withSession(ledger.knex, async (other) => {
      await serializable(other);
      await other('notes').select();
      await other('notes').where({ id: 'one' }).update({ at_commit: null });
    });
    return change(session);
  }).catch((error) => error);
}

/** Two units of work that lock the same rows in different orders; the error of the one that the server has given up. */
async function deadlock(
  work = (session: Session, id: string): PromiseLike<unknown> => session('notes').where({ id }).update({ at_commit: null }),
): Promise<any> {
  const locked = [deferred(), deferred()] as const;
  const lockBoth = (mine: 0 | 1, ids: [string, string]) =>
    withSession(ledger.knex, async (session) => {
      await session.raw("SET LOCAL deadlock_timeout = '20ms'");
      await work(session, ids[0]);
      locked[mine].resolve();
      await locked[mine === 0 ? 1 : 0].promise;
      await work(session, ids[1]);
    });
  const results = await Promise.allSettled([lockBoth(0, ['one', 'two']), lockBoth(1, ['two', 'one'])]);
  const [lost] = results.filter((result) => result.status === 'rejected');
  expect(results.filter(({ status }) => status === 'fulfilled')).toHaveLength(1);
  return lost?.reason;
}

describe('isRetryable() is true for what the server has given up for the sake of another transaction', () => {
  it('a serialization failure at a statement', async () => {
    const error = await conflict((session) => session('notes').where({ id: 'one' }).update({ at_commit: null }));
    expect(error).toMatchObject({ code: '40001' });
    expect(isRetryable(error)).toBe(true);
  });

  it('a serialization failure at COMMIT', async () => {
    const error = await withSession(ledger.knex, async (session) => {
      await session('notes').insert({ id: 'a', at_commit: 'conflict' });
    }).catch((reason) => reason);
    expect(error).toMatchObject({ code: '40001' });
    expect(isRetryable(error)).toBe(true);
  });

  it('write skew: each has changed what the other has read', async () => {
    const error = await conflict((session) => session('notes').where({ id: 'two' }).update({ at_commit: null }));
    expect(error).toMatchObject({ code: '40001' });
    expect(isRetryable(error)).toBe(true);
  });

  it('a deadlock', async () => {
    const error = await deadlock();
    expect(error).toMatchObject({ code: '40P01' });
    expect(isRetryable(error)).toBe(true);
  });

  it('one that was swallowed, and made the COMMIT a ROLLBACK', async () => {
    const error = await conflict((session) =>
      session('notes')
        .where({ id: 'one' })
        .update({ at_commit: null })
        .then(undefined, () => {}),
    );
    expect(error).toBeInstanceOf(TransactionAbortedError);
    expect(isRetryable(error)).toBe(true);
  });

  it('the error of a later statement, which the first has made fail', async () => {
    const error = await conflict(async (session) => {
      await session('notes')
        .where({ id: 'one' })
        .update({ at_commit: null })
        .then(undefined, () => {});
      await session('notes').select();
    });
    expect(error).toMatchObject({ code: '25P02', cause: { code: '40001' } });
    expect(isRetryable(error)).toBe(true);
  });

  it('the errors of Objection, which keep the one of the driver', async () => {
    const error = await deadlock((session, id) => Note.query(session).findById(id).patch({ at_commit: null }).then());
    expect(isRetryable(error)).toBe(true);
    const conflicting = await conflict((session) => Note.query(session).findById('one').patch({ at_commit: null }).then());
    expect(isRetryable(conflicting)).toBe(true);
  });

  it('one inside of errors of the application', async () => {
    const error = await deadlock();
    expect(isRetryable(new Error('transfer failed', { cause: new Error('booking failed', { cause: error }) }))).toBe(true);
  });

  it('what an error handler is given', async () => {
    const site = await openSite(ledger, async (req, res) => {
      await insert(req, 'a', 'conflict');
      res.status(201).end();
    });
    expect((await site.get()).status).toBe(500);
    expect(site.errors.map(isRetryable)).toEqual([true]);
  });
});

describe('isRetryable() is false', () => {
  it('for an outcome that nobody knows, whatever is inside of it', async () => {
    const unknown = await rejection(withSession(ledger.knex, (session) => session('notes').insert({ id: 'a', at_commit: 'die' })));
    expect(unknown).toBeInstanceOf(CommitUnknownError);
    expect(isRetryable(unknown)).toBe(false);
    const transient = Object.assign(new Error('could not serialize'), { code: '40001' });
    expect(isRetryable(new CommitUnknownError(transient))).toBe(false);
    expect(isRetryable(new Error('wrapped', { cause: new CommitUnknownError(transient) }))).toBe(false);
  });

  it('for other failures of statements and of COMMIT', async () => {
    const failures = [
      (session: Session) => session('notes').insert({ id: 'one' }),
      (session: Session) => session('notes').insert({ id: 'a', at_commit: 'fail' }),
      (session: Session) => session.raw('SELECT nonsense'),
      (session: Session) => session.raw('SELECT pg_terminate_backend(pg_backend_pid())'),
      (session: Session) => session.raw('SELECT pg_sleep(10)'),
    ];
    for (const fail of failures) {
      const error = await rejection(withSession(ledger.knex, (session) => fail(session), { transactionTimeout: 100 }));
      expect(isRetryable(error)).toBe(false);
    }
  });

  it('for what is no error, or is its own cause', () => {
    const cycle = new Error('one');
    cycle.cause = new Error('two', { cause: cycle });
    const self = new Error('self');
    self.cause = self;
    const codeOnly = { code: '40001' };
    const others = [
      undefined,
      null,
      '40001',
      40001,
      {},
      codeOnly,
      [],
      Symbol('40001'),
      cycle,
      self,
      new Error('40001'),
      new SessionError('ERR_SESSION_CLOSED', ''),
    ];
    expect(others.map((other) => isRetryable(other))).toEqual(others.map(() => false));
  });

  it('for a code that only looks like one', () => {
    for (const code of [40001, '40003', '40002', '40000', '4000', 'ERR_40001'])
      expect(isRetryable(Object.assign(new Error('x'), { code }))).toBe(false);
  });
});
