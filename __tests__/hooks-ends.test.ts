import express, { type RequestHandler } from 'express';
import { type Session, type SessionOptions, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { get, listen } from './support/http';
import { answerError, caught } from './support/knex';
import { failOnWarnings } from './support/warnings';
import { type Handler, isSql, useBench } from './support/wire';

failOnWarnings();
const bench = useBench(
  {},
  {
    isolationLevel: 'repeatable read',
    settings: { 'app.tenant': 'a' },
    transactionTimeout: (req) => Number(req.get('time-limit') ?? 30_000),
  },
);
const failure = new RangeError('no');

let ran: unknown[];
beforeEach(() => {
  ran = [];
});

/** Notes that it ran, and what was stored at that time, as another connection sees it. */
const looks = (name: string) => async () => void ran.push([name, await bench.stored()]);

function addNotes(session: Session): void {
  for (const kind of ['afterCommit', 'afterRollback'] as const) session[kind](async () => void ran.push(kind, await bench.stored()));
}

/** A middleware with options of its own. */
async function serve(knex: Knex, options: SessionOptions, handler: RequestHandler) {
  const sessions = sessionMiddleware(knex, options);
  const app = express().use(sessions).get('/', handler).use(sessionErrorHandler(), answerError);
  const server = await listen(app);
  return { ...server, sessions };
}

describe('when COMMIT fails', () => {
  it('calls afterRollback hooks only: a deferred constraint (scenario 53)', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert([{ name: 'a' }, { name: 'a' }]);
      addNotes(req.session);
      res.status(201).end();
    });

    expect([answer.status, ran]).toEqual([500, ['afterRollback', []]]);
    expect(bench.errors).toMatchObject([{ code: '23505' }]);
  });

  it('calls afterRollback hooks only, on a connection of their own: the backend was killed before it', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      addNotes(req.session);
      req.session.afterRollback(async (session) => void (await session('items').insert({ name: 'of the hook' })));
      req.session.beforeCommit(() => bench.kill());
      res.status(201).end();
    });

    expect([answer.status, ran]).toEqual([500, ['afterRollback', []]]);
    expect(await bench.stored()).toEqual(['of the hook']);
  });

  it('calls neither if the outcome is unknown, stored or not', async () => {
    for (const how of ['cut-before', 'cut-after'] as const) {
      bench.proxy.onFrontend((message) => (isSql(message, 'COMMIT;') ? how : undefined));
      const answer = await bench.answer(async (req, res) => {
        await req.session('items').insert({ name: how });
        addNotes(req.session);
        res.status(201).end();
      });
      expect(JSON.parse(answer.body).code).toBe('ERR_COMMIT_UNKNOWN');
    }
    expect(ran).toEqual([]);
  });

  it('calls afterRollback hooks only, if there was no connection to begin with', async () => {
    const unreachable = bench.database.knex({ connection: 'postgres://127.0.0.1:1/none', log: { error: () => {}, warn: () => {} } });
    const server = await serve(unreachable, {}, async (req, res) => {
      addNotes(req.session);
      await caught(req.session.raw('select 1'));
      res.end();
    });
    expect((await get(server.url)).status).toBe(503);
    await server.close();
    expect(ran).toEqual(['afterRollback', []]);
  });
});

describe('when the handler ends the session by hand', () => {
  it('has called the hooks when commit() resolves, and calls none with the response, whatever its status', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      req.session.beforeCommit(async (session) => void (await session('items').insert({ name: 'b' })));
      addNotes(req.session);
      await req.session.commit();
      ran.push('handler');
      res.status(401).end();
    });
    expect([answer.status, ran]).toEqual([401, ['afterCommit', ['a', 'b'], 'handler']]);
  });

  it('rejects commit() with the error of a beforeCommit hook, after a rollback', async () => {
    await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      req.session.beforeCommit(() => Promise.reject(failure));
      addNotes(req.session);
      ran.push(await caught(req.session.commit()), req.session.outcome);
      res.status(400).end();
    });
    expect(ran).toEqual(['afterRollback', [], failure, 'rolled back']);
  });

  it('has called the hooks when rollback() resolves', async () => {
    await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      addNotes(req.session);
      await req.session.rollback();
      ran.push('handler');
      res.end();
    });
    expect(ran).toEqual(['afterRollback', [], 'handler']);
  });
});

describe('when the session is that of withSession()', () => {
  it('calls them by its end, before its promise settles, under its options', async () => {
    const options = { readOnly: false, isolationLevel: 'serializable', settings: { 'app.tenant': 'b' } } as const;
    const look = `select current_setting('transaction_isolation') as level, current_setting('app.tenant') as tenant, current_setting('app.user', true) as user`;
    const work = (fails: boolean) => async (session: Session) => {
      await session.set({ 'app.user': '7' });
      await session('items').insert({ name: 'a' });
      addNotes(session);
      session.afterCommit(async (own) => void ran.push((await own.raw(look)).rows[0]));
      if (fails) throw failure;
    };
    await caught(withSession(bench.knex, work(true), options).catch(() => ran.push('rejected')));
    await withSession(bench.knex, work(false), options).then(() => ran.push('resolved'));

    const settings = { level: 'serializable', tenant: 'b', user: '7' };
    expect(ran).toEqual(['afterRollback', [], 'rejected', 'afterCommit', ['a'], settings, 'resolved']);
  });

  it('reports what a hook throws, and resolves', async () => {
    const reported: unknown[] = [];
    const onError = (error: unknown) => void reported.push(error);
    await expect(
      withSession(bench.knex, (session) => session.afterCommit(() => Promise.reject(failure)), { onError }),
    ).resolves.toBeUndefined();
    expect(reported).toEqual([failure]);
  });
});

describe('when a hook has a session of its own', () => {
  it('has the options and the settings of the request, those that were set later, and its own', async () => {
    const look = `select current_setting('transaction_isolation') as level, current_setting('app.tenant') as tenant,
      current_setting('app.user', true) as user, current_setting('app.hook', true) as hook`;
    await bench.answer(async (req, res) => {
      await req.session.set({ 'app.user': '7' });
      await req.session.raw('select 1');
      req.session.afterCommit(async (session) => {
        await session.set({ 'app.hook': 'x' });
        ran.push((await session.raw(look)).rows[0]);
      });
      res.end();
    });
    expect(ran).toEqual([{ level: 'repeatable read', tenant: 'a', user: '7', hook: 'x' }]);
  });

  it('is bounded: it is rolled back past transactionTimeout, and the response goes', async () => {
    const handler: Handler = async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      req.session.afterCommit((session) => session.raw('select pg_sleep(60)'));
      req.session.afterCommit((session) =>
        session('items')
          .insert({ name: 'b' })
          .then(() => new Promise(() => {})),
      );
      res.status(201).end();
    };
    const answer = await bench.answer(handler, { headers: { 'time-limit': '300' } });
    expect(answer.status).toBe(201);
    expect(bench.reported).toMatchObject([{ code: 'ERR_SESSION_TIMEOUT' }, { code: 'ERR_SESSION_TIMEOUT' }]);
    expect(await bench.stored()).toEqual(['a']);
  });
});

describe('when a hook uses the database', () => {
  it('gives it a unit of work of its own, committed after the hook (scenario 54)', async () => {
    const transaction = () => "select pg_current_xact_id()::text || ' ' || current_setting('transaction_isolation') as id";
    const ids: string[] = [];
    const answer = await bench.answer(async (req, res) => {
      const note = async (session: Session) => void ids.push((await session.raw(transaction())).rows[0].id);
      await note(req.session);
      req.session.afterCommit(async (session) => {
        await note(session);
        await session('items').insert({ name: 'of the hook' });
        ran.push(session === req.session, session.outcome, await bench.stored());
        session.afterCommit(looks('after the hook'));
        expect((await caught(req.session.raw('select 1'))).code).toBe('ERR_SESSION_CLOSED');
      });
      req.session.afterCommit(note);
      res.end();
    });

    expect(answer.status).toBe(200);
    expect(new Set(ids).size).toBe(3);
    expect(ran).toEqual([false, 'open', [], ['after the hook', ['of the hook']]]);
    expect(bench.reported).toEqual([]);
  });

  it('loses only its own work if it fails: its COMMIT, a statement, or by its own rollback', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      req.session.afterCommit(async (session) => void (await session('items').insert({ name: 'a' })));
      req.session.afterCommit(async (session) => void (await session('items').insert({ name: 'bad' })));
      req.session.afterCommit(async (session) => [await session('items').insert({ name: 'b' }), await session.rollback()]);
      req.session.afterCommit(async (session) => [await session('items').insert({ name: 'c' }), await session.commit()]);
      req.session.afterCommit(async (session) => void (await session('items').insert({ name: 'd' })));
      res.status(201).end();
    });

    expect(answer.status).toBe(201);
    expect(bench.reported).toMatchObject([{ code: '23505' }, { code: '23514' }]);
    expect(await bench.stored()).toEqual(['a', 'c', 'd']);
  });

  it('has one after a rollback too, for what must be kept', async () => {
    const answer = await bench.answer(async (req, res) => {
      await req.session('items').insert({ name: 'a' });
      req.session.afterRollback(async (session) => void (await session('items').insert({ name: 'failed' })));
      res.status(401).end();
    });

    expect(answer.status).toBe(401);
    expect(await bench.stored()).toEqual(['failed']);
  });
});
