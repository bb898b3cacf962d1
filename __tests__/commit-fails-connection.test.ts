import { CommitUnknownError, SessionUnavailableError } from 'express-knex-session';
import type { Knex } from 'knex';
import { get } from './support/http';
import { controlOf, flavours, type Handler, insert, type ServeOptions, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import type { WireDecision, WireMessage } from './support/wire-proxy';

failOnWarnings();
const ledger = useLedger();
const failure = new Error('mine');

describe.each(flavours)('on $version', (flavour) => {
  const serve = ledger.serving(flavour);
  const insertAndSay201: Handler = async (req, res) => {
    await insert(req, 'a');
    res.cookie('kind', 'mine').status(201).json({ ok: true });
  };
  const insertAndThrow: Handler = async (req) => {
    await insert(req, 'a');
    throw failure;
  };

  /** An app on a pool of one connection, and what the wire does to messages with this text. */
  const serveDisturbed = async (handler: Handler, options?: ServeOptions) => {
    const { knex, proxy } = await ledger.throughProxy({ pool: { min: 0, max: 1 } });
    const served = await serve(async (req, res, next) => (req.path === '/pid' ? tellPid(req, res, next) : handler(req, res, next)), {
      knex,
      ...options,
    });
    return {
      ...served,
      knex,
      proxy,
      onStatement(text: RegExp, decision: WireDecision) {
        proxy.onFrontend((message) => (isStatement(message, text) ? decision : undefined));
      },
      /** The connection was replaced, and the next request is clean. */
      async isReplaced() {
        proxy.onFrontend(undefined);
        expect(poolUsage(knex)).toMatchObject({ used: 0, pendingAcquires: 0 });
        const connections = new Set(proxy.frontend.map(({ connection }) => connection));
        expect(await get(`${served.url}/pid`)).toMatchObject({ status: 200 });
        expect(proxy.frontend.map(({ connection }) => connection)).toContain(Math.max(...connections) + 1);
      },
    };
  };

  // Scenario 4.
  describe('when BEGIN fails', () => {
    it.each([['cut-before'], ['cut-after']] as const)(
      'answers 503 ERR_SESSION_UNAVAILABLE, and the connection leaves the pool (%s)',
      async (decision) => {
        const app = await serveDisturbed(insertAndSay201);
        app.onStatement(/^BEGIN/, decision);
        expect(await get(app.url)).toMatchObject({ status: 503, body: expect.stringContaining('ERR_SESSION_UNAVAILABLE') });
        expect(app.errors).toEqual([expect.any(SessionUnavailableError)]);
        expect(app.errors[0].cause).toBeInstanceOf(Error);
        await eventually(async () => expect(await ledger.stored()).toEqual([]));
        await app.isReplaced();
      },
    );

    it('does so too if the connection has died in the pool', async () => {
      const app = await serveDisturbed(insertAndSay201);
      const { pid } = JSON.parse((await get(`${app.url}/pid`)).body);
      // Killed while the client looks away: it finds out with BEGIN.
      app.proxy.onFrontend(async (message) => {
        if (!isStatement(message, /^BEGIN/)) return;
        app.proxy.onFrontend(undefined);
        await ledger.database.admin.raw('SELECT pg_terminate_backend(?, 5000)', [pid]);
      });
      expect(await get(app.url)).toMatchObject({ status: 503 });
      expect(await ledger.stored()).toEqual([]);
      await app.isReplaced();
    });
  });

  describe('when the database is down', () => {
    it('answers 503 ERR_SESSION_UNAVAILABLE, also if the handler swallows it', async () => {
      const knex = ledger.pool({ connection: 'postgres://localhost:1/nothing' });
      const { url, errors } = await serve(
        async (req, res) => {
          const reading = insert(req, 'a');
          await (req.path === '/swallowed' ? reading.catch(() => {}) : reading);
          res.json({ ok: true });
        },
        { knex },
      );
      for (const path of ['/', '/swallowed']) {
        expect(await get(url + path)).toMatchObject({ status: 503, body: expect.stringContaining('ERR_SESSION_UNAVAILABLE') });
      }
      expect(errors.map(({ cause }) => cause.code)).toEqual(['ECONNREFUSED', 'ECONNREFUSED']);
    });
  });

  // Scenario 21.
  describe('when the backend is killed before COMMIT', () => {
    it.each(['a success is sent', 'another statement comes'])('answers 500, stores nothing and drops the connection: %s', async (then) => {
      const app = await serveDisturbed(async (req, res) => {
        await insert(req, 'a');
        await ledger.killBackend();
        await eventually(() => expect(app.proxy.connections()).toBe(0));
        if (then === 'another statement comes') await insert(req, 'b');
        res.status(201).json({ ok: true });
      });
      const answer = await get(app.url);
      expect(answer).toMatchObject({ status: 500, complete: true });
      expect(app.errors).toHaveLength(1);
      // No COMMIT was sent: it is known that nothing was stored.
      expect(app.errors[0]).not.toBeInstanceOf(CommitUnknownError);
      expect(await ledger.stored()).toEqual([]);
      await app.isReplaced();
    });

    it('keeps an error response of the handler', async () => {
      const app = await serveDisturbed(async (req, res) => {
        await insert(req, 'a');
        await ledger.killBackend();
        res.status(409).send('mine');
      });
      expect(await get(app.url)).toMatchObject({ status: 409, body: 'mine' });
      await app.isReplaced();
    });
  });

  // Scenario 22.
  describe('when the connection is lost while COMMIT is under way', () => {
    const isUnknown = async (app: Awaited<ReturnType<typeof serveDisturbed>>) => {
      const answer = await get(app.url);
      expect(answer).toMatchObject({ status: 500, body: expect.stringContaining('ERR_COMMIT_UNKNOWN'), complete: true });
      expect(answer.body).not.toMatch(/rolled back/);
      expect(answer.headers['set-cookie']).toBeUndefined();
      expect(app.errors).toEqual([expect.any(CommitUnknownError)]);
      expect(app.errors[0].cause).toBeInstanceOf(Error);
      // Never tried again.
      expect(controlOf(app.proxy)).toEqual(['BEGIN;', 'COMMIT;']);
    };

    it('says ERR_COMMIT_UNKNOWN: the server had committed', async () => {
      const app = await serveDisturbed(insertAndSay201);
      app.onStatement(/^COMMIT/, 'cut-after');
      await isUnknown(app);
      await eventually(async () => expect(await ledger.stored()).toEqual(['a']));
      await app.isReplaced();
    });

    it('says ERR_COMMIT_UNKNOWN: the server never saw it', async () => {
      const app = await serveDisturbed(insertAndSay201);
      app.onStatement(/^COMMIT/, 'cut-before');
      await isUnknown(app);
      await app.isReplaced();
      expect(await ledger.stored()).toEqual([]);
    });

    it('says ERR_COMMIT_UNKNOWN: the backend was killed (FATAL 57P01)', async () => {
      const app = await serveDisturbed(async (req, res) => {
        await insert(req, 'a', 'die');
        res.sendStatus(201);
      });
      await isUnknown(app);
      expect(app.errors[0].cause).toMatchObject({ code: '57P01' });
      await app.isReplaced();
    });

    it('shows it in `outcome`, also to a handler that commits itself', async () => {
      const seen: unknown[] = [];
      const app = await serveDisturbed(async (req, res) => {
        await insert(req, 'a', 'die');
        await req.session.commit().catch((error) => seen.push(error.code));
        seen.push(req.session.outcome);
        res.status(409).send('mine');
      });
      expect(await get(app.url)).toMatchObject({ status: 409, body: 'mine' });
      expect(seen).toEqual(['ERR_COMMIT_UNKNOWN', 'unknown']);
      await app.isReplaced();
    });
  });

  // Scenarios 23 and 24.
  describe('when ROLLBACK fails', () => {
    const cases: [string, Handler, object][] = [
      ["keeps the application's error", insertAndThrow, { status: 500, body: '{"message":"mine"}' }],
      [
        'keeps the response',
        async (req, res) => {
          await insert(req, 'a');
          res.status(409).send('mine');
        },
        { status: 409, body: 'mine' },
      ],
    ];
    it.each(cases)('%s, reports the failure to onError, and drops the connection', async (_, handler, expected) => {
      const reported: [unknown, unknown][] = [];
      const app = await serveDisturbed(handler, { onError: (error, req) => reported.push([error, req?.originalUrl]) });
      app.onStatement(/^ROLLBACK/, 'cut-before');
      expect(await get(`${app.url}/x?y=1`)).toMatchObject(expected);
      expect(reported).toEqual([[expect.any(Error), '/x?y=1']]);
      await app.isReplaced();
      expect(await ledger.stored()).toEqual([]);
    });

    it.each([
      ['there is no onError', undefined, []],
      ['onError fails itself', throwBroken, [expect.stringContaining('onError is broken')]],
      ['onError fails later', async () => throwBroken(), [expect.stringContaining('onError is broken')]],
    ])('has Knex log it if %s', async (_, onError, before) => {
      const logged: unknown[] = [];
      const log = { error: (message: unknown) => logged.push(message) } as unknown as Knex.Logger;
      const { knex, proxy } = await ledger.throughProxy({ log });
      const { url } = await serve(insertAndThrow, { knex, ...(onError && { onError }) });
      proxy.onFrontend((message) => (isStatement(message, /^ROLLBACK/) ? 'cut-before' : undefined));
      expect(await get(url)).toMatchObject({ status: 500, body: '{"message":"mine"}' });
      const expected = [...before, expect.stringContaining('Connection terminated')];
      await eventually(() => expect(logged).toHaveLength(expected.length));
      expect(logged).toEqual(expect.arrayContaining(expected));
    });
  });
});

function throwBroken(): never {
  throw new Error('onError is broken');
}

const tellPid: Handler = async (req, res) => {
  const { rows } = await req.session.raw('SELECT pg_backend_pid() AS pid');
  res.json(rows[0]);
};

function isStatement({ type, text }: WireMessage, wanted: RegExp): boolean {
  return (type === 'Q' || type === 'P') && wanted.test(text);
}
