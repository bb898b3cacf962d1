import type { Request, Response } from 'express';
import { type Session, type SessionOptions, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { get, RawClient } from './support/http';
import { meetingPoint, waysToLeave } from './support/leaving';
import { type AtCommit, answerErrors, flavours, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
// Each with a database of its own.
const first = useLedger();
const second = useLedger();

interface Sessions {
  one: Session;
  two: Session;
}
type Work = (sessions: Sessions, res: Response, req: Request) => unknown;
/** Per database; by default the two are alike. */
interface Setup extends SessionOptions {
  knexOfTwo?: Knex;
  shouldCommitTwo?: () => boolean;
}

function write(session: Session, id: string, atCommit?: AtCommit): Knex.QueryBuilder {
  return session('notes').insert({ id, at_commit: atCommit ?? null });
}

/** Writes `a` into the first database, and `b` into the second. */
async function writeBoth({ one, two }: Sessions, { one: atFirst, two: atSecond }: { one?: AtCommit; two?: AtCommit } = {}): Promise<void> {
  await write(one, 'a', atFirst);
  await write(two, 'b', atSecond);
}

const stored = async () => [await first.stored(), await second.stored()];
const used = () => [poolUsage(first.knex).used, poolUsage(second.knex).used];

// Scenario 35.
describe.each(flavours)('on $version, with two databases under two properties', (flavour) => {
  const serve = async (work: Work, { knexOfTwo = second.knex, shouldCommitTwo, ...options }: Setup = {}) => {
    const errors: any[] = [];
    const app = flavour.express();
    app.use(sessionMiddleware(first.knex, { ...options, property: 'one' }));
    app.use(sessionMiddleware(knexOfTwo, { ...options, ...(shouldCommitTwo && { shouldCommit: shouldCommitTwo }), property: 'two' }));
    app.use(flavour.route((req, res) => work(req as unknown as Sessions, res, req)));
    app.use(sessionErrorHandler(), answerErrors(errors));
    return { ...(await first.listen(app)), errors };
  };

  it('commits both before the response leaves', async () => {
    const { url } = await serve(async (sessions, res) => {
      await writeBoth(sessions);
      expect(used()).toEqual([1, 1]);
      res.status(201).json({ ok: true });
    });
    expect(await get(url)).toMatchObject({ status: 201 });
    expect(used()).toEqual([0, 0]);
    expect(await stored()).toEqual([['a'], ['b']]);
  });

  it.each(['one', 'two'] as const)('holds the response until COMMIT in each: %s is slow', async (slow) => {
    const held = await (slow === 'one' ? first : second).holdCommits();
    const { port } = await serve(async (sessions, res) => {
      await writeBoth(sessions, { [slow]: 'wait' });
      res.sendStatus(201);
    });
    const client = (await RawClient.connect(port)).get('/');
    await held.waiting();
    expect(client.received).toBe('');
    await held.release();
    await client.readUntil('201 Created');
    await client.destroy();
    expect(await stored()).toEqual([['a'], ['b']]);
  });

  it.each([
    ['throws', 500],
    ['answers 409', 409],
  ])('rolls both back if the handler %s', async (how, status) => {
    const { url } = await serve(async (sessions, res) => {
      await writeBoth(sessions);
      if (how === 'throws') throw new Error('mine');
      res.sendStatus(status);
    });
    expect(await get(url)).toMatchObject({ status });
    expect(used()).toEqual([0, 0]);
    expect(await stored()).toEqual([[], []]);
  });

  it('rolls the second back if the first cannot commit', async () => {
    const { url, errors } = await serve(async (sessions, res) => {
      await writeBoth(sessions, { one: 'fail' });
      res.cookie('kind', 'mine').sendStatus(201);
    });
    const answer = await get(url);
    expect(answer).toMatchObject({ status: 500, body: expect.stringContaining('note a is refused') });
    expect(answer.headers['set-cookie']).toBeUndefined();
    expect(errors).toHaveLength(1);
    expect(used()).toEqual([0, 0]);
    expect(await stored()).toEqual([[], []]);
  });

  it('ends each by its own result if the second cannot commit: the first has, and the client hears of the error', async () => {
    const outcomes: unknown[] = [];
    const { url } = await serve(async (sessions, res) => {
      res.once('close', () => outcomes.push(sessions.one.outcome, sessions.two.outcome));
      await writeBoth(sessions, { two: 'fail' });
      res.sendStatus(201);
    });
    expect(await get(url)).toMatchObject({ status: 500, body: expect.stringContaining('note b is refused') });
    expect(used()).toEqual([0, 0]);
    expect(await stored()).toEqual([['a'], []]);
    expect(outcomes).toEqual(['committed', 'rolled back']);
  });

  it('answers with the first error if neither can commit; the second is rolled back as it should be', async () => {
    const reported: unknown[] = [];
    const { url, errors } = await serve(
      async (sessions, res) => {
        await writeBoth(sessions, { one: 'fail', two: 'fail' });
        res.sendStatus(201);
      },
      { onError: (error) => reported.push(error) },
    );
    expect(await get(url)).toMatchObject({ status: 500, body: expect.stringContaining('note a is refused') });
    expect(errors).toHaveLength(1);
    expect(reported).toEqual([]);
    expect(await stored()).toEqual([[], []]);
  });

  it('does nothing for the one that was not used', async () => {
    const { url } = await serve(async ({ one, two }, res, req) => {
      await write(two, 'b', req.path === '/refused' ? 'fail' : undefined);
      res.json([one.outcome, used()[0]]);
    });
    expect(await get(url)).toMatchObject({ status: 200, body: '["unused",0]' });
    expect(await get(`${url}/refused`)).toMatchObject({ status: 500 });
    expect(await stored()).toEqual([[], ['b']]);
  });

  it('keeps the answer of the one that only reads', async () => {
    const { url } = await serve(async ({ one, two }, res) => {
      await one.raw('SET TRANSACTION READ ONLY');
      const rows = await one('notes').select();
      await write(two, 'b');
      res.json(rows);
    });
    expect(await get(url)).toMatchObject({ status: 200, body: '[]' });
    expect(await stored()).toEqual([[], ['b']]);
  });

  it('rolls back only the one with setRollbackOnly()', async () => {
    const { url } = await serve(async (sessions, res) => {
      await writeBoth(sessions);
      sessions.one.setRollbackOnly();
      res.sendStatus(201);
    });
    expect(await get(url)).toMatchObject({ status: 201 });
    expect(await stored()).toEqual([[], ['b']]);
  });

  it('leaves alone what the handler has committed itself', async () => {
    const { url } = await serve(async (sessions) => {
      await writeBoth(sessions);
      await sessions.one.commit();
      throw new Error('mine');
    });
    expect(await get(url)).toMatchObject({ status: 500 });
    expect(await stored()).toEqual([['a'], []]);
  });

  it('asks the shouldCommit of each', async () => {
    const { url } = await serve(
      async (sessions, res) => {
        await writeBoth(sessions);
        res.sendStatus(409);
      },
      { shouldCommit: () => true, shouldCommitTwo: () => false },
    );
    expect(await get(url)).toMatchObject({ status: 409 });
    expect(await stored()).toEqual([['a'], []]);
  });

  it('says 503 and rolls the other back if one database is down', async () => {
    const knexOfTwo = second.pool({ connection: 'postgres://localhost:1/nothing' });
    const { url } = await serve((sessions) => writeBoth(sessions), { knexOfTwo });
    expect(await get(url)).toMatchObject({ status: 503 });
    expect(await stored()).toEqual([[], []]);
  });

  it.each(waysToLeave)('rolls both back when the client disconnects (%s)', async (_, leave) => {
    const point = meetingPoint();
    const { port } = await serve(async (sessions) => {
      await writeBoth(sessions);
      await point.arrive();
    });
    const client = (await RawClient.connect(port)).get('/');
    await point.reached;
    await leave(client);
    await Promise.all([first.isClean(), second.isClean()]);
    expect(await stored()).toEqual([[], []]);
  });

  it('leaves both to finish when the client disconnects during the first COMMIT', async () => {
    const held = await first.holdCommits();
    const outcomes: (() => unknown[])[] = [];
    const { port } = await serve(async (sessions, res) => {
      outcomes.push(() => [sessions.one.outcome, sessions.two.outcome, res.destroyed]);
      await writeBoth(sessions, { one: 'wait' });
      res.sendStatus(201);
    });
    const client = (await RawClient.connect(port)).get('/');
    await held.waiting();
    await client.reset();
    await eventually(() => expect(outcomes[0]?.()).toEqual(['open', 'open', true]));
    await held.release();
    await eventually(() => expect(outcomes[0]?.()).toEqual(['committed', 'committed', true]));
    expect(await stored()).toEqual([['a'], ['b']]);
  });

  it('commits what `shouldCommit` of the first writes by the second, whose first use that is', async () => {
    const app = flavour.express();
    const shouldCommit = (req: Request, res: Response): boolean => {
      write((req as unknown as Sessions).two, 'audit').catch(() => {});
      return res.statusCode < 400;
    };
    app.use(sessionMiddleware(first.knex, { property: 'one', shouldCommit }), sessionMiddleware(second.knex, { property: 'two' }));
    app.use(
      flavour.route(async (req, res) => {
        await write((req as unknown as Sessions).one, 'a');
        res.sendStatus(201);
      }),
    );
    app.use(sessionErrorHandler());
    const { url } = await first.listen(app);
    expect((await get(url)).status).toBe(201);
    expect(await stored()).toEqual([['a'], ['audit']]);
    expect(used()).toEqual([0, 0]);
  });
});
