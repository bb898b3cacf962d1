import type { Session, SessionOptions, SettleReason, TransactionMessage } from 'express-knex-session';
import { openSite, type Site } from './support/deadlines';
import { useEvents } from './support/events';
import { RawClient } from './support/http';
import { flavours, type Handler, insert, useLedger } from './support/ledger';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();
const events = useEvents();

const mine = new Error('mine');
const answer =
  (status: number): Handler =>
  (_req, res) =>
    void res.status(status).json({ ok: true });
const after =
  (work: (session: Session) => unknown, status: number): Handler =>
  async (req, res) => {
    await work(req.session);
    res.sendStatus(status);
  };

interface Case {
  name: string;
  /** After a note was inserted. */
  end: Handler;
  outcome: TransactionMessage['outcome'];
  reason: SettleReason;
  decision?: TransactionMessage['decision'];
  atCommit?: 'fail' | 'conflict' | 'die';
  error?: unknown;
  options?: SessionOptions;
}

const coded = (code: string) => expect.objectContaining({ code });

const cases: Case[] = [
  { name: 'a 201', end: answer(201), outcome: 'committed', reason: 'response' },
  { name: 'a 404', end: answer(404), outcome: 'rolled back', reason: 'response' },
  {
    name: 'commit(), then a 409',
    end: after((session) => session.commit(), 409),
    outcome: 'committed',
    reason: 'commit',
  },
  {
    name: 'rollback(error), then a 200',
    end: after((session) => session.rollback(mine), 200),
    outcome: 'rolled back',
    reason: 'rollback',
    error: mine,
  },
  {
    name: 'setRollbackOnly(error), then a 200',
    end: after((session) => session.setRollbackOnly(mine), 200),
    outcome: 'rolled back',
    reason: 'rollback only',
    error: mine,
  },
  {
    name: 'setRollbackOnly(), then a 400',
    end: after((session) => session.setRollbackOnly(), 400),
    outcome: 'rolled back',
    reason: 'rollback only',
  },
  {
    name: 'setRollbackOnly(), then a throw',
    end: (req) => {
      req.session.setRollbackOnly();
      throw mine;
    },
    outcome: 'rolled back',
    reason: 'error',
    error: mine,
  },
  { name: 'a throw', end: () => Promise.reject(mine), outcome: 'rolled back', reason: 'error', error: mine },
  { name: 'next(error)', end: (_req, _res, next) => next(mine), outcome: 'rolled back', reason: 'error', error: mine },
  {
    name: 'a swallowed error',
    end: after((session) => session.raw('SELECT 1/0').catch(() => {}), 201),
    decision: 'commit',
    outcome: 'rolled back',
    reason: 'error',
    error: expect.objectContaining({ code: 'ERR_TRANSACTION_ABORTED', cause: coded('22012') }),
  },
  {
    name: 'a savepoint left open',
    end: after((session) => session.transaction(), 201),
    outcome: 'rolled back',
    reason: 'error',
    error: coded('ERR_SAVEPOINT_OPEN'),
  },
  {
    name: 'a COMMIT that a deferred constraint refuses',
    end: answer(201),
    atCommit: 'fail',
    decision: 'commit',
    outcome: 'rolled back',
    reason: 'error',
    error: coded('23514'),
  },
  {
    name: "the handler's commit() that fails, caught",
    end: after((session) => session.commit().catch(() => {}), 200),
    atCommit: 'conflict',
    decision: 'commit',
    outcome: 'rolled back',
    reason: 'error',
    error: coded('40001'),
  },
  {
    name: 'a COMMIT whose connection is lost',
    end: answer(201),
    atCommit: 'die',
    decision: 'commit',
    outcome: 'unknown',
    reason: 'error',
    error: coded('ERR_COMMIT_UNKNOWN'),
  },
  {
    name: 'a beforeCommit hook that throws',
    end: (req, res) => {
      req.session.beforeCommit(() => Promise.reject(mine));
      res.sendStatus(201);
    },
    outcome: 'rolled back',
    reason: 'error',
    error: mine,
  },
  {
    name: 'a raw COMMIT, which is not sent',
    end: after((session) => session.raw('SELECT 1; COMMIT').catch(() => {}), 201),
    outcome: 'rolled back',
    reason: 'error',
    error: coded('ERR_TRANSACTION_CONTROL'),
  },
  {
    name: 'a shouldCommit() that throws',
    end: answer(201),
    options: {
      shouldCommit: () => {
        throw mine;
      },
    },
    outcome: 'rolled back',
    reason: 'error',
    error: mine,
  },
  {
    name: 'a statement that fails, then a 409',
    end: after((session) => session.raw('SELECT 1/0').catch(() => {}), 409),
    outcome: 'rolled back',
    reason: 'response',
  },
  {
    name: 'an error after the response',
    end(_req, res) {
      res.sendStatus(201);
      throw mine;
    },
    outcome: 'committed',
    reason: 'response',
  },
  {
    name: 'a beforeCommit hook that calls setRollbackOnly(error)',
    end: after((session) => session.beforeCommit((own) => own.setRollbackOnly(mine)), 201),
    outcome: 'rolled back',
    reason: 'rollback only',
    error: mine,
  },
  {
    name: 'an open time that is over',
    end: (req) => req.session.raw('SELECT pg_sleep(10)'),
    options: { transactionTimeout: 30 },
    outcome: 'rolled back',
    reason: 'timeout',
    error: coded('ERR_SESSION_TIMEOUT'),
  },
  {
    name: "a 201 with commitAt: 'finish'",
    end: answer(201),
    options: { commitAt: 'finish' },
    outcome: 'committed',
    reason: 'response',
  },
  {
    name: "a 201 with commitAt: 'end'",
    end(_req, res) {
      res.status(201).write('half ');
      res.end('other half');
    },
    options: { commitAt: 'end' },
    outcome: 'committed',
    reason: 'response',
  },
];

describe.each(flavours)('on $version, when a transaction ends by', (flavour) => {
  it.each(cases)('$name: $outcome, $reason', async ({ end, outcome, reason, decision, atCommit, error, options }) => {
    let req!: Express.Request;
    const handler: Handler = async (request, res, next) => {
      req = request;
      await insert(request, 'secret', atCommit);
      return end(request, res, next);
    };
    const site = await openSite(ledger, handler, { flavour, ...options });
    const answer = await site.get();
    const [settled] = await events.settled();
    const { session, request, ...rest } = settled as TransactionMessage;
    expect(rest).toEqual({
      id: expect.stringMatching(/^session\d+$/),
      startedAt: expect.any(Number),
      waitedMs: expect.any(Number),
      heldMs: expect.any(Number),
      statements: expect.any(Number),
      lastStatement: expect.any(String),
      decision: decision ?? (outcome === 'committed' ? 'commit' : 'rollback'),
      outcome,
      reason,
      error,
      bytesHeld: expect.any(Number),
    });
    expect(session).toBe(req.session);
    expect(request).toBe(req);
    const isDestroyed = atCommit === 'die';
    expect(events.order()).toEqual(['acquire', 'open', 'settle', ...(isDestroyed ? ['destroyed'] : []), 'settled']);
    expect(new Set(events.told.filter(({ channel }) => channel !== 'destroyed').map(({ message }) => message)).size).toBe(1);
    expect(answer.status).toBeGreaterThanOrEqual(200);
  });

  it('the client, who has gone: rolled back, disconnect', async () => {
    const site = await openSite(ledger, (req) => insert(req, 'a').then(() => req.session.raw('SELECT pg_sleep(10)')), { flavour });
    const client = (await RawClient.connect(site.port)).get('/');
    await eventually(() => expect(events.told.at(-1)?.message).toMatchObject({ statements: 2 }));
    await client.reset();
    expect(await events.settled()).toMatchObject([
      { outcome: 'rolled back', reason: 'disconnect', decision: 'rollback', error: { code: 'ERR_SESSION_CLOSED' } },
    ]);
  });

  it('drain(), which does not wait any longer: rolled back, shutdown', async () => {
    const site: Site = await openSite(ledger, (req) => insert(req, 'a').then(() => req.session.raw('SELECT pg_sleep(10)')), { flavour });
    const asked = site.get();
    await eventually(() => expect(events.told.at(-1)?.message).toMatchObject({ statements: 2 }));
    await site.sessions.drain(0);
    expect(await asked).toMatchObject({ status: 503 });
    expect(await events.settled()).toMatchObject([
      { outcome: 'rolled back', reason: 'shutdown', error: { code: 'ERR_SESSION_UNAVAILABLE' } },
    ]);
  });

  it('checkpoints: each transaction is told of, and all have one id', async () => {
    const handler: Handler = async (req, res) => {
      for (const id of ['a', 'b']) {
        await insert(req, id);
        await req.session.checkpoint();
      }
      // Nothing to be told of.
      await req.session.checkpoint();
      await insert(req, 'c');
      res.sendStatus(201);
    };
    const site = await openSite(ledger, handler, { flavour });
    expect(await site.get()).toMatchObject({ status: 201 });
    const settled = await events.settled(3);
    expect(settled.map(({ reason, outcome, statements }) => [reason, outcome, statements])).toEqual([
      ['checkpoint', 'committed', 1],
      ['checkpoint', 'committed', 1],
      ['response', 'committed', 1],
    ]);
    const messages = new Set(events.told.map(({ message }) => message));
    expect([messages.size, new Set(settled.map(({ id }) => id)).size]).toEqual([3, 1]);
    expect(events.order()).toEqual(Array(3).fill(['acquire', 'open', 'settle', 'settled']).flat());
  });
});
