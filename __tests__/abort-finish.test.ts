import { once } from 'node:events';
import type { Request, Response } from 'express';
import type { SessionOptions } from 'express-knex-session';
import { ENDLESS, pidOf, useAborts, used, type Victim } from './support/abort';
import { get } from './support/http';
import { type MeetingPoint, meetingPoint, waysToLeave } from './support/leaving';
import { express5Flavour, type Handler, insert } from './support/ledger';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const aborts = useAborts();

/** Inserts, lets the client leave, and only then inserts more and answers. */
async function leftInTheMiddle(
  leave: (victim: Victim) => Promise<unknown>,
  options: SessionOptions,
  { before = ['a'], answer = (_req, res) => void res.status(201).json({ ok: true }) }: { before?: string[]; answer?: Handler } = {},
): Promise<Victim> {
  const point: MeetingPoint = meetingPoint();
  const victim = await aborts.open(
    async (req, res, next) => {
      for (const id of before) await insert(req, id);
      const gone = once(res, 'close');
      await Promise.all([point.arrive(), gone]);
      await insert(req, 'b');
      await req.session.raw('SELECT pg_sleep(0.01)');
      await insert(req, 'c');
      await answer(req, res, next);
    },
    { onDisconnect: 'finish', ...options },
  );
  await point.reached;
  await leave(victim);
  point.goOn();
  await eventually(() => expect([victim.hasEnded, used(victim.knex)]).toEqual([true, 0]));
  return victim;
}

describe("when the client leaves, with onDisconnect: 'finish'", () => {
  describe.each(['head', 'end', 'finish'] as const)("and commitAt: '%s'", (commitAt) => {
    it.each(waysToLeave)('(%s) between statements: the handler goes on, and its success commits', async (_, leave) => {
      const victim = await leftInTheMiddle(({ client }) => leave(client), { commitAt });
      expect(await aborts.ledger.stored()).toEqual(['a', 'b', 'c']);
      expect(victim.error).toBeUndefined();
      expect(victim.reasons).toEqual([]);
      expect(victim.request.session.outcome).toBe('committed');
      expect(await pidOf(victim.knex)).toBe(victim.pid);
    });

    it('before the first statement: the same', async () => {
      await leftInTheMiddle(({ client }) => client.reset(), { commitAt }, { before: [] });
      expect(await aborts.ledger.stored()).toEqual(['b', 'c']);
    });

    it('and the handler fails: rolls back', async () => {
      const answer: Handler = () => Promise.reject(new Error('mine'));
      const victim = await leftInTheMiddle(({ client }) => client.reset(), { commitAt }, { answer });
      expect(victim.error).toMatchObject({ message: 'mine' });
      await victim.leftNothing();
    });

    it('and the handler answers with 409: rolls back', async () => {
      const victim = await leftInTheMiddle(({ client }) => client.reset(), { commitAt }, { answer: (_req, res) => res.sendStatus(409) });
      await victim.leftNothing();
    });

    it('in a running statement: it is not cancelled', async () => {
      const victim = await aborts.open(
        async (req, res) => {
          await insert(req, 'a');
          await req.session.raw('SELECT pg_sleep(0.2)');
          res.sendStatus(201);
        },
        { onDisconnect: 'finish', commitAt },
      );
      await victim.isSleeping();
      await victim.client.reset();
      await eventually(() => expect(victim.response.destroyed).toBe(true));
      expect(await victim.backend()).toMatchObject({ state: 'active' });
      await eventually(() => expect(used(victim.knex)).toBe(0));
      expect(await aborts.ledger.stored()).toEqual(['a']);
      expect(victim.reasons).toEqual([]);
    });

    it('and the handler hangs: transactionTimeout ends it', async () => {
      const victim = await aborts.open(
        async (req) => {
          await insert(req, 'a');
          await req.session.raw(ENDLESS);
        },
        { onDisconnect: 'finish', commitAt, transactionTimeout: 150, onError: () => {} },
      );
      await victim.isSleeping();
      await victim.client.reset();
      await victim.wasAborted({ code: 'ERR_SESSION_TIMEOUT', cause: { code: '57014' } });
    });

    it('and the handler hangs between statements: transactionTimeout ends it', async () => {
      const victim = await aborts.open(
        async (req) => {
          await insert(req, 'a');
          await new Promise(() => {});
        },
        { onDisconnect: 'finish', commitAt, transactionTimeout: 100, onError: () => {} },
      );
      await eventually(() => expect(used(victim.knex)).toBe(1));
      await victim.client.reset();
      await eventually(() => expect(used(victim.knex)).toBe(0));
      expect(victim.reasons).toMatchObject([{ code: 'ERR_SESSION_TIMEOUT' }]);
      await victim.leftNothing();
    });
  });

  it('while it waits for the pool: it still gets its connection, and commits', async () => {
    const { ledger } = aborts;
    const knex = ledger.pool({ pool: { min: 0, max: 1 } });
    const taken = await knex.transaction();
    let res: Response | undefined;
    const { port } = await ledger.serving(express5Flavour)(
      async (req, response) => {
        res = response;
        await insert(req, 'a');
        response.sendStatus(201);
      },
      { knex, onDisconnect: 'finish' },
    );
    void get(`http://127.0.0.1:${port}`, { signal: AbortSignal.timeout(100) });
    await eventually(() => expect(res?.destroyed).toBe(true));
    expect(knex.client.pool.numPendingAcquires()).toBe(1);
    await taken.rollback();
    await eventually(async () => expect(await ledger.stored()).toEqual(['a']));
  });
});

describe('when onDisconnect is a function', () => {
  it('asks it once for each request, about that request', async () => {
    const asked: string[] = [];
    const onDisconnect = (req: Request) => {
      asked.push(req.path);
      return req.path === '/finish' ? ('finish' as const) : ('rollback' as const);
    };
    const points = [meetingPoint(), meetingPoint()];
    const { port } = await aborts.ledger.serving(express5Flavour)(
      async (req, res) => {
        await insert(req, req.path);
        const gone = once(res, 'close');
        await Promise.all([points[req.path === '/finish' ? 0 : 1]?.arrive(), gone]);
        res.sendStatus(201);
      },
      { onDisconnect },
    );
    for (const [i, path] of ['/finish', '/roll-back'].entries()) {
      const leaving = new AbortController();
      void get(`http://127.0.0.1:${port}${path}`, { signal: leaving.signal });
      await points[i]?.reached;
      leaving.abort();
      points[i]?.goOn();
      await aborts.ledger.isClean();
    }
    expect(asked).toEqual(['/finish', '/roll-back']);
    expect(await aborts.ledger.stored()).toEqual(['/finish']);
  });

  it.each([
    ['something else', () => 'ignore' as never, "Expected `onDisconnect` to return 'rollback' or 'finish', got 'ignore'."],
    ['a promise', (async () => 'finish') as never, 'It must answer at once.'],
    [
      'nothing but an error',
      (): never => {
        throw new Error('of mine');
      },
      'of mine',
    ],
  ])('that answers with %s: the request fails, though the handler swallows the error', async (_, onDisconnect, message) => {
    const { url, errors } = await aborts.ledger.serving(express5Flavour)(
      async (req, res) => {
        await expect(Promise.resolve(insert(req, 'a'))).rejects.toThrow(message);
        res.sendStatus(201);
      },
      { onDisconnect },
    );
    expect(await get(url)).toMatchObject({ status: 500 });
    expect(errors).toMatchObject([{ message: expect.stringContaining(message) }]);
    expect(await aborts.ledger.stored()).toEqual([]);
  });
});
