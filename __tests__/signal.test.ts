import { once } from 'node:events';
import express, { type Response } from 'express';
import { type Session, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import { clientHasGone, ENDLESS, useAborts, used } from './support/abort';
import { get, RawClient } from './support/http';
import { meetingPoint, waysToLeave } from './support/leaving';
import { answerErrors, express5Flavour, type Handler, insert } from './support/ledger';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const aborts = useAborts();
const serve = aborts.ledger.serving(express5Flavour);

/** A handler that waits until its client has gone. */
async function visit(before: Handler, after: Handler, options: object = {}): Promise<RawClient> {
  const point = meetingPoint();
  const { port } = await serve(async (req, res, next) => {
    await before(req, res, next);
    const gone = once(res, 'close');
    await Promise.all([point.arrive(), gone]);
    await after(req, res, next);
  }, options);
  const client = (await RawClient.connect(port)).get('/');
  await point.reached;
  point.goOn();
  return client;
}

describe('when the client leaves, session.signal', () => {
  it.each(waysToLeave)('(%s) of a session that is never used: aborts with the reason, without a connection', async (_, leave) => {
    let signal: AbortSignal | undefined;
    const knex = aborts.ledger.pool();
    const client = await visit(
      (req) => {
        signal = req.session.signal;
      },
      () => {},
      { knex },
    );
    expect(signal?.aborted).toBe(false);
    await leave(client);
    await eventually(() => expect(signal?.aborted).toBe(true));
    expect(signal?.reason).toMatchObject(clientHasGone);
    expect(knex.client.pool.numFree()).toBe(0);
  });

  it.each([
    ['that was never used', () => {}],
    ['that was used', (req) => insert(req, 'a')],
  ] satisfies [string, Handler][])('of a session %s, asked for afterwards: is aborted', async (_, before) => {
    let reason: unknown;
    const client = await visit(before, (req) => {
      reason = req.session.signal.reason;
    });
    await client.reset();
    await eventually(() => expect(reason).toMatchObject(clientHasGone));
  });

  it('is the same, before and after, and each time that it is asked for', async () => {
    const signals = new Set<AbortSignal>();
    const ask: Handler = (req) => {
      for (let i = 0; i < 3; i++) signals.add(req.session.signal);
    };
    let isOver = false;
    const client = await visit(ask, async (req, res, next) => {
      ask(req, res, next);
      await insert(req, 'a').catch(() => {});
      ask(req, res, next);
      isOver = true;
    });
    await client.reset();
    await eventually(() => expect(isOver).toBe(true));
    expect([...signals]).toMatchObject([{ aborted: true }]);
  });

  it('of a savepoint is that of the session', async () => {
    await withSession(aborts.ledger.knex, (session) =>
      session.transaction(async (savepoint) => {
        expect((savepoint as Session).signal).toBe(session.signal);
      }),
    );
  });

  it('has a statement refused by the same reason that comes afterwards', async () => {
    let seen: unknown[] = [];
    const client = await visit(
      (req) => insert(req, 'a'),
      async (req) => {
        const error = await insert(req, 'b').catch((failure: unknown) => failure);
        seen = [error, req.session.signal.reason];
      },
    );
    await client.reset();
    await eventually(() => expect(seen).toHaveLength(2));
    expect(seen[0]).toMatchObject({ ...clientHasGone, cause: seen[1] });
  });

  it("is not touched with onDisconnect: 'finish', used or not", async () => {
    const signals: AbortSignal[] = [];
    const paths: Handler[] = [() => {}, (req) => insert(req, 'a')];
    for (const before of paths) {
      let isOver = false;
      const client = await visit(
        async (req, res, next) => {
          signals.push(req.session.signal);
          await before(req, res, next);
        },
        async (req, res) => {
          await insert(req, 'b').onConflict('id').ignore();
          signals.push(req.session.signal);
          res.sendStatus(201);
          isOver = true;
        },
        { onDisconnect: 'finish' },
      );
      await client.reset();
      await eventually(() => expect(isOver).toBe(true));
      await aborts.ledger.isClean();
    }
    expect(signals.map(({ aborted }) => aborted)).toEqual([false, false, false, false]);
    expect(await aborts.ledger.stored()).toEqual(['a', 'b']);
  });
});

describe('when the session ends in another way, session.signal is never aborted', () => {
  const ends: [string, (session: Session, res: Response) => unknown][] = [
    ['no statement, and 200', (_session, res) => res.send('ok')],
    [
      'a commit',
      (session, res) =>
        session('notes')
          .insert({ id: 'a' })
          .then(() => res.sendStatus(201)),
    ],
    [
      'a rollback by 409',
      (session, res) =>
        session('notes')
          .insert({ id: 'a' })
          .then(() => res.sendStatus(409)),
    ],
    [
      'an error',
      (session) =>
        session('notes')
          .insert({ id: 'a' })
          .then(() => Promise.reject(new Error('mine'))),
    ],
    [
      'a COMMIT that fails',
      (session, res) =>
        session('notes')
          .insert({ id: 'a', at_commit: 'fail' })
          .then(() => res.sendStatus(201)),
    ],
    [
      'session.commit()',
      async (session, res) => {
        await session('notes').insert({ id: 'a' });
        await session.commit();
        res.send('ok');
      },
    ],
    [
      'session.rollback()',
      async (session, res) => {
        await session('notes').insert({ id: 'a' });
        await session.rollback();
        res.send('ok');
      },
    ],
  ];
  it.each(ends)('%s', async (_, end) => {
    let signal: AbortSignal | undefined;
    let response: Response | undefined;
    const { url } = await serve(async (req, res) => {
      signal = req.session.signal;
      response = res;
      await end(req.session, res);
    });
    expect(await get(url)).toMatchObject({ complete: true });
    await eventually(() => expect(response?.destroyed).toBe(true));
    await aborts.ledger.isClean();
    expect(signal?.aborted).toBe(false);
  });

  it.each(['used', 'unused'])('a response (%s session) that its client does not read to the end', async (use) => {
    let signal: AbortSignal | undefined;
    let response: Response | undefined;
    const { port } = await serve(async (req, res) => {
      signal = req.session.signal;
      response = res;
      if (use === 'used') await insert(req, 'a');
      res.status(201).end(Buffer.alloc(20_000_000));
    });
    const client = (await RawClient.connect(port)).pause().get('/');
    await eventually(() => expect(response?.headersSent && response.writableEnded).toBe(true));
    await aborts.ledger.isClean();
    expect(await aborts.ledger.stored()).toEqual(use === 'used' ? ['a'] : []);
    await client.reset();
    await eventually(() => expect(response?.destroyed).toBe(true));
    expect(signal?.aborted).toBe(false);
  });
});

describe('when a listener of session.signal', () => {
  it.each([
    ['commits', (session: Session) => session.commit()],
    ['rolls back', (session: Session) => session.rollback()],
    ['runs a statement', (session: Session) => session('notes').insert({ id: 'late' }).then()],
  ])('%s: nothing is stored', async (_, act) => {
    let acted: Promise<unknown> | undefined;
    const victim = await aborts.open(async (req) => {
      const { signal } = req.session;
      signal.addEventListener('abort', () => {
        acted = act(req.session).catch((error: unknown) => error);
      });
      await insert(req, 'a');
      await req.session.raw(ENDLESS);
    });
    await victim.isSleeping();
    await victim.client.reset();
    await victim.isOver();
    await acted;
    expect(victim.reasons).toHaveLength(1);
    await victim.leftNothing();
  });
});

describe('when two sessions serve one request', () => {
  it('both are aborted by a client that leaves, and their statements are cancelled', async () => {
    const pools = [aborts.ledger.pool(), aborts.ledger.pool()] as const;
    const errors: unknown[] = [];
    const reasons: unknown[] = [];
    const app = express();
    app.use(sessionMiddleware(pools[0]), sessionMiddleware(pools[1], { property: 'db' }));
    app.use(async (req, res) => {
      const sessions = [req.session, (req as unknown as { db: Session }).db];
      for (const { signal } of sessions) signal.addEventListener('abort', () => reasons.push(signal.reason));
      const runs = sessions.map((session, i) =>
        session('notes')
          .insert({ id: `${i}` })
          .then(() => session.raw(ENDLESS)),
      );
      for (const result of await Promise.allSettled(runs)) errors.push((result as PromiseRejectedResult).reason);
      res.sendStatus(201);
    });
    app.use(sessionErrorHandler(), answerErrors([]));
    const { port } = await aborts.ledger.listen(app);
    const client = (await RawClient.connect(port)).get('/');
    const sleeping = () =>
      aborts.ledger.database
        .admin('pg_stat_activity')
        .where({ query: ENDLESS, wait_event: 'PgSleep' })
        .whereRaw('datname = current_database()');
    await eventually(async () => expect(await sleeping()).toHaveLength(2));
    await client.reset();
    await eventually(async () => {
      expect(await sleeping()).toEqual([]);
      expect(pools.map(used)).toEqual([0, 0]);
      expect(errors).toHaveLength(2);
    }, 1_000);
    expect(new Set(errors)).toEqual(new Set(reasons));
    expect(errors).toMatchObject([clientHasGone, clientHasGone]);
    expect(await aborts.ledger.stored()).toEqual([]);
  });
});
