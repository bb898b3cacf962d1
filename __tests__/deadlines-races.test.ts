import { setTimeout as sleep } from 'node:timers/promises';
import type { Request } from 'express';
import { getSession, type SessionOptions, sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { expectNothingTold, never, openSite, rejection, type Site } from './support/deadlines';
import { get } from './support/http';
import { type AtCommit, insert, useLedger } from './support/ledger';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger(8);
const timedOut = { status: 503, body: expect.stringContaining('"ERR_SESSION_TIMEOUT"') };

describe('when a handler answers in the moment in which its time is over', () => {
  it.each(['head', 'end', 'finish'] as const)("does what the answer says, request by request (commitAt: '%s')", async (commitAt) => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, String(req.query['id']));
        const until = performance.now() + Number(req.query['ms']);
        await sleep(Number(req.query['ms']) - 2);
        // As near as can be: the last of it without giving way to the timer, every second time.
        while (Number(req.query['id']) % 2 && performance.now() < until);
        res.status(201).send('stored');
      },
      { transactionTimeout: 60, commitAt },
    );
    const said: string[] = [];
    for (let round = 0; round < 3; round++) {
      const ids = [0, 1, 2, 3, 4, 5].map((i) => round * 6 + i);
      const answers = await Promise.all(ids.map((id) => get(`${site.url}/?id=${id}&ms=${50 + (id % 18)}`)));
      for (const [i, answer] of answers.entries()) {
        expect([201, 503]).toContain(answer.status);
        expect(answer.complete).toBe(true);
        if (answer.status === 201) said.push(String(ids[i]));
        else expect(answer).toMatchObject(timedOut);
      }
    }
    await ledger.isClean();
    // With 'finish' the client has been told before COMMIT: what it is refused is not stored all the same.
    const stored = await ledger.stored();
    if (commitAt === 'finish') expect(said).toEqual(expect.arrayContaining(stored));
    else expect(stored.sort()).toEqual(said.sort());
    const { committed, rolledBack, open } = site.sessions.stats();
    expect([committed + rolledBack, open]).toEqual([18, 0]);
    expect(committed).toBe(stored.length);
  });
});

describe('when the response is held for a statement that was not awaited', () => {
  it.each([
    ['head', (res: { status(code: number): { json(body: unknown): unknown } }) => res.status(201).json('stored')],
    ['end', (res) => res.status(201).json('stored')],
  ] as [NonNullable<SessionOptions['commitAt'] & string>, (res: any) => unknown][])(
    "is bounded by transactionTimeout: the success is replaced by the error (commitAt: '%s')",
    async (commitAt, answer) => {
      let told: any;
      const site = await openSite(
        ledger,
        async (req, res) => {
          await insert(req, 'a');
          rejection(req.session.raw('SELECT pg_sleep(10)')).then((error) => {
            told = error;
          });
          answer(res);
        },
        { transactionTimeout: 200, commitAt },
      );
      expect(await site.get()).toMatchObject(timedOut);
      await eventually(() => expect(told).toMatchObject({ code: 'ERR_SESSION_TIMEOUT' }));
      expect(await ledger.stored()).toEqual([]);
      expectNothingTold(told);
    },
  );

  it('keeps a refusal, and does not wait for the statement', async () => {
    const site = await openSite(ledger, async (req, res) => {
      req.session.raw('SELECT pg_sleep(10)').catch(() => {});
      await sleep(20);
      res.status(404).send('not here');
    });
    const begun = performance.now();
    expect(await site.get()).toMatchObject({ status: 404, body: 'not here' });
    expect(performance.now() - begun).toBeLessThan(1_000);
  });

  it('keeps the response of a session that is rolled back anyway', async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        req.session.setRollbackOnly('dry run');
        req.session.raw('SELECT pg_sleep(10)').catch(() => {});
        res.send('dry');
      },
      { transactionTimeout: 100 },
    );
    expect(await site.get()).toMatchObject({ status: 200, body: 'dry' });
    expect(await ledger.stored()).toEqual([]);
  });
});

describe('when a handler commits itself', () => {
  it('rejects commit() with the error if its time passes while it waits for a statement, and the app answers by it', async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        req.session.raw('SELECT pg_sleep(10)').catch(() => {});
        await req.session.commit();
        res.status(201).end();
      },
      { transactionTimeout: 100 },
    );
    expect(await site.get()).toMatchObject(timedOut);
    expect(site.errors).toMatchObject([{ code: 'ERR_SESSION_TIMEOUT' }]);
    expect(await ledger.stored()).toEqual([]);
  });

  it('never says committed of what was not, nor the other way round, if both happen at once', async () => {
    const said: string[] = [];
    const site = await openSite(
      ledger,
      async (req, res) => {
        const id = String(req.query['id']);
        await insert(req, id);
        await sleep(28 + (Number(id) % 8));
        await req.session.commit();
        said.push(id);
        await sleep(20);
        res.status(201).end();
      },
      { transactionTimeout: 35 },
    );
    for (let round = 0; round < 3; round++) {
      const answers = await Promise.all([0, 1, 2, 3, 4, 5, 6, 7].map((i) => get(`${site.url}/?id=${round * 8 + i}`)));
      for (const answer of answers) if (answer.status !== 201) expect(answer).toMatchObject(timedOut);
      expect((await ledger.stored()).sort()).toEqual([...said].sort());
    }
  });

  it("answers by the app's error handler though the handler throws in the very moment in which that is asked", async () => {
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        await new Promise((resolve) => req.session.signal.addEventListener('abort', resolve));
        // It is settled when the rollback has been done; the error handlers are asked some steps later.
        await req.session.commit().catch(() => {});
        for (let step = 0; step < Number(req.query['steps']); step++) await null;
        res.status(418);
        throw new Error('mine');
      },
      { transactionTimeout: 30 },
    );
    const answers = await Promise.all(Array.from({ length: 24 }, (_, steps) => get(`${site.url}/?steps=${steps}`)));
    for (const answer of answers) expect(answer).toMatchObject(timedOut);
  });

  it('leaves a COMMIT to finish that is under way', async () => {
    const held = await ledger.holdCommits();
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a', 'wait');
        await req.session.commit();
        res.status(201).end();
      },
      { transactionTimeout: 60 },
    );
    const answer = site.get();
    await held.waiting();
    await sleep(100);
    await held.release();
    expect((await answer).status).toBe(201);
    expect(await ledger.stored()).toEqual(['a']);
  });
});

describe('when a response has two sessions', () => {
  const note = (session: Knex, id: string, at_commit: AtCommit | null = null) => session('notes').insert({ id, at_commit });

  /** `req.session` has a limit, `req.other` has none. */
  const two = (
    handler: (one: Knex.Transaction, other: Knex.Transaction, req: Request, res: any) => unknown,
    { limit = 100, ...options }: SessionOptions & { limit?: number } = {},
  ): Promise<Site> =>
    openSite(
      ledger,
      {
        routes(app) {
          app.use(sessionMiddleware(ledger.knex, { property: 'other', transactionTimeout: 0, ...options }));
          app.use((req, res) => handler(req.session, getSession(req, 'other'), req, res) as undefined);
        },
      },
      { transactionTimeout: limit, ...options },
    );

  it.each(['head', 'end', 'finish'] as const)("rolls both back if one is interrupted (commitAt: '%s')", async (commitAt) => {
    const site = await two(
      async (one, other) => {
        await note(other, 'other');
        await note(one, 'one');
        await never();
      },
      { commitAt },
    );
    expect(await site.get()).toMatchObject(timedOut);
    await ledger.isClean();
    expect(await ledger.stored()).toEqual([]);
    expect(site.errors).toHaveLength(1);
  });

  it('does so though the other is in the middle of a statement, and refuses it what comes then', async () => {
    let told: any;
    const site = await two(async (one, other) => {
      await note(one, 'one');
      await rejection(other.raw('SELECT pg_sleep(10)'));
      told = await rejection(note(other, 'other'));
    });
    expect(await site.get()).toMatchObject(timedOut);
    await eventually(() => expect(told).toMatchObject({ code: 'ERR_SESSION_CLOSED' }));
    expect(await ledger.stored()).toEqual([]);
    await ledger.isClean();
  });

  it('lets a session not begin any more that was not used before', async () => {
    let told: any;
    const site = await two(async (one, other) => {
      await rejection(one.raw('SELECT pg_sleep(10)'));
      told = await rejection(note(other, 'other'));
    });
    expect(await site.get()).toMatchObject(timedOut);
    await eventually(() => expect(told).toMatchObject({ code: 'ERR_SESSION_CLOSED' }));
    expect(await ledger.stored()).toEqual([]);
  });

  it('answers with the error if one is interrupted while the first commits, and rolls it back', async () => {
    const held = await ledger.holdCommits();
    const site = await two(
      async (one, other, _req, res) => {
        // The first that was used settles first.
        await note(other, 'other', 'wait');
        await note(one, 'one');
        res.status(201).send('stored');
      },
      { limit: 250 },
    );
    const answer = site.get();
    await held.waiting();
    await eventually(() => expect(site.sessions.stats()).toMatchObject({ open: 0, rolledBack: 1 }));
    await held.release();
    expect(await answer).toMatchObject(timedOut);
    // The first had gone too far: that is what two databases without two-phase commit mean.
    expect(await ledger.stored()).toEqual(['other']);
  });
});
