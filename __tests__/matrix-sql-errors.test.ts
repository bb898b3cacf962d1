import type { Request } from 'express';
import { isRetryable } from 'express-knex-session';
import type { Knex } from 'knex';
import { type Handler, insert } from './support/ledger';
import { describeFault } from './support/matrix';
import type { Resource } from './support/matrix-pool';
import { type Ending, type Stage, useStages } from './support/matrix-stage';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const stages = useStages();

const rolledBack = { answer: { status: 500 }, outcome: 'rolled back', stored: [], connection: 'kept' } satisfies Ending;

/** Inserts `a`, does this, and says that all is well. */
const afterInsert =
  (work: Handler): Handler =>
  async (req, res, next) => {
    await insert(req, 'a');
    await work(req, res, next);
    res.status(201).json('ok');
  };
const insertAgain: Handler = async (req) => {
  await insert(req, 'a');
};
const nothing: Handler = () => {};

/** What the server answered to the last command. */
function lastTags(stage: Stage): string[] {
  const tags: string[] = [];
  stage.proxy.onBackend(({ type, text }) => {
    if (type === 'C' || type === 'E') tags.push(text);
  });
  return tags;
}

describeFault('SQL error thrown', {
  async 'during a statement'() {
    const stage = await stages.open();
    await stage.send(afterInsert(insertAgain));
    await stage.ends({ ...rolledBack, error: { code: '23505' } });
  },

  async 'during COMMIT'() {
    const stage = await stages.open();
    await stage.send(afterInsert((req) => insert(req, 'b', 'fail')));
    await stage.ends({ ...rolledBack, error: { code: '23514' } });
  },
});

describeFault('SQL error swallowed', {
  async 'during a statement'() {
    const stage = await stages.open();
    await stage.send(
      afterInsert(async (req) => {
        await insert(req, 'a').catch(() => {});
        await insert(req, 'b');
      }),
    );
    await stage.ends({ ...rolledBack, error: { code: '25P02', cause: { code: '23505' } } });
  },

  async 'between statements'() {
    const stage = await stages.open();
    await stage.send(
      afterInsert(async (req) => {
        // Nobody has waited for it when the next one is issued.
        insert(req, 'a').catch(() => {});
        await insert(req, 'b').catch(() => {});
      }),
    );
    await stage.ends({ ...rolledBack, error: { code: 'ERR_TRANSACTION_ABORTED', cause: { code: '23505' } } });
  },

  async 'during COMMIT'() {
    const stage = await stages.open();
    const tags = lastTags(stage);
    await stage.send(afterInsert((req) => insert(req, 'a').catch(() => {})));
    await stage.ends({ ...rolledBack, error: { code: 'ERR_TRANSACTION_ABORTED', cause: { code: '23505' } } });
    expect(stage.proxy.sql()).toContain('COMMIT;');
    expect(tags).toContain('ROLLBACK');
  },
});

const tellRetryable = async (stage: Stage, code: string): Promise<void> => {
  await stage.ends({ ...rolledBack, error: { code } });
  expect(isRetryable(stage.errors[0])).toBe(true);
  expect(isRetryable(new Error('of the app', { cause: stage.errors[0] }))).toBe(true);
};

/** Reads what the other one writes, and the other way round: one of them must fail. */
const crossReads = async (stage: Stage, other: Knex.Transaction): Promise<void> => {
  await other('notes').where({ id: 'mine' });
  await stage.send(
    afterInsert(async (req) => {
      await req.session('notes').where({ id: 'theirs' });
      await insert(req, 'mine');
      await other('notes').insert({ id: 'theirs' });
      await other.commit();
    }),
  );
};

/** Holds a lock that the other one waits for, and then waits for one that he holds. */
const crossLocks = async (stage: Stage, wait: Handler): Promise<void> => {
  await stage.lock.hold();
  await stage.send(
    afterInsert(async (req, res, next) => {
      await req.session.raw('SELECT pg_advisory_xact_lock(2)');
      await stage.lock.closeCircle(2);
      await wait(req, res, next);
    }),
  );
};

describeFault('40001, 40P01', {
  'during a statement': {
    async '40001'() {
      const stage = await stages.open({ settings: { default_transaction_isolation: 'repeatable\\ read' } });
      await stages.ledger.database.admin('notes').insert({ id: 'theirs' });
      await stage.send(
        afterInsert(async (req) => {
          await stages.ledger.database.admin('notes').where({ id: 'theirs' }).del();
          await req.session('notes').where({ id: 'theirs' }).update({ id: 'mine' });
        }),
      );
      await tellRetryable(stage, '40001');
    },
    async '40P01'() {
      const stage = await stages.open({ settings: { deadlock_timeout: '10ms' } });
      await crossLocks(stage, async (req) => {
        await req.session.raw(stage.lock.statement);
      });
      await tellRetryable(stage, '40P01');
    },
  },

  'during COMMIT': {
    async '40001'() {
      const stage = await stages.open({ settings: { default_transaction_isolation: 'serializable' } });
      const other = await stages.ledger.database.admin.transaction(undefined, { isolationLevel: 'serializable' });
      await crossReads(stage, other);
      await stage.ends({ ...rolledBack, error: { code: '40001' }, stored: ['theirs'] });
      expect(isRetryable(stage.errors[0])).toBe(true);
      expect(stage.proxy.sql()).toContain('COMMIT;');
    },
    async '40P01'() {
      const stage = await stages.open({ settings: { deadlock_timeout: '10ms' } });
      await crossLocks(stage, async (req) => {
        await insert(req, 'b', 'wait');
      });
      await tellRetryable(stage, '40P01');
      expect(stage.proxy.sql()).toContain('COMMIT;');
    },
  },
});

describeFault('statement_timeout', {
  async 'during a statement'() {
    const stage = await stages.open({ settings: { statement_timeout: 200 } });
    await stage.send(afterInsert((req) => req.session.raw('SELECT pg_sleep(10)')));
    await stage.ends({ ...rolledBack, error: { code: '57014' } });
  },

  // PostgreSQL stops the clock of statement_timeout before a COMMIT does its work; these are what can end one.
  'during COMMIT': {
    async 'lock_timeout: 55P03'() {
      const stage = await stages.open({ settings: { lock_timeout: 50 } });
      await stage.play('during COMMIT');
      await stage.ends({ ...rolledBack, error: { code: '55P03' } });
    },
    async 'pg_cancel_backend: 57014'() {
      const stage = await stages.open();
      await stage.play('during COMMIT');
      await stages.ledger.database.admin.raw('SELECT pg_cancel_backend(?)', [
        await stages.ledger.database.backendOf(stage.taken as Resource),
      ]);
      await stage.ends({ ...rolledBack, error: { code: '57014' } });
    },
  },
});

describeFault('idle_in_transaction timeout', {
  'between statements': Object.fromEntries(
    [['a statement comes next', (req: Request) => insert(req, 'b')] as const, ['COMMIT comes next', nothing] as const].map(
      ([name, then]: readonly [string, Handler]) => [
        name,
        async () => {
          const stage = await stages.open({ settings: { idle_in_transaction_session_timeout: 200 } });
          await stage.send(
            afterInsert(async (req, res, next) => {
              await eventually(() => expect(stage.isLost).toBe(true));
              await then(req, res, next);
            }),
          );
          await stage.ends({ ...rolledBack, error: { code: '25P03' }, connection: 'destroyed' });
        },
      ],
    ),
  ),
});
