import { SessionError, sessionErrorHandler } from 'express-knex-session';
import { get } from './support/http';
import { flavours, type Handler, insert, type ServeOptions, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

describe.each(flavours)('on $version', (flavour) => {
  const serve = ledger.serving(flavour);

  // Scenario 13.
  describe('when shouldCommit decides', () => {
    const write =
      (status: number): Handler =>
      async (req, res) => {
        await insert(req, 'a');
        res.status(status).send('mine');
      };

    it('commits a 422 if it says so', async () => {
      const { url } = await serve(write(422), { shouldCommit: (_req, res) => res.statusCode === 422 });
      expect(await get(url)).toMatchObject({ status: 422, body: 'mine' });
      expect(await ledger.stored()).toEqual(['a']);
    });

    it('rolls back a 200 if it says so, and keeps the response', async () => {
      const { url } = await serve(write(200), { shouldCommit: (req) => req.query['dry'] === undefined });
      expect(await get(`${url}?dry`)).toMatchObject({ status: 200, body: 'mine' });
      expect(await ledger.stored()).toEqual([]);
      expect(await get(url)).toMatchObject({ status: 200, body: 'mine' });
      expect(await ledger.stored()).toEqual(['a']);
    });

    it('is asked once, when status and headers are fixed, and not for an unused session', async () => {
      const asked: unknown[] = [];
      const shouldCommit: ServeOptions['shouldCommit'] = (_req, res) => {
        asked.push([res.statusCode, res.getHeader('X-Mine')]);
        return true;
      };
      const { url } = await serve(
        async (req, res) => {
          if (req.path === '/used') await insert(req, 'a');
          res.status(202).set('X-Mine', 'yes').end();
        },
        { shouldCommit },
      );
      await get(`${url}/unused`);
      expect(asked).toEqual([]);
      await get(`${url}/used`);
      expect(asked).toEqual([[202, 'yes']]);
    });

    it('is not asked about an error that has passed sessionErrorHandler()', async () => {
      const { url } = await serve(
        async (req) => {
          await insert(req, 'a');
          throw new Error('mine');
        },
        { shouldCommit: () => true },
      );
      expect(await get(url)).toMatchObject({ status: 500 });
      expect(await ledger.stored()).toEqual([]);
    });

    it('rolls back if it throws, and passes its error on', async () => {
      const failure = Object.assign(new Error('cannot decide'), { status: 502 });
      const { url, errors } = await serve(write(200), {
        shouldCommit: () => {
          throw failure;
        },
      });
      expect(await get(url)).toMatchObject({ status: 502, body: '{"message":"cannot decide"}' });
      expect(errors).toEqual([failure]);
      expect(await ledger.stored()).toEqual([]);
    });

    it.each([
      ['resolves', async () => true],
      ['rejects', () => Promise.reject(new Error('late'))],
    ])('rolls back if it returns a promise that %s, and says that it must not', async (_, shouldCommit) => {
      const { url, errors } = await serve(write(200), { shouldCommit: shouldCommit as never });
      expect(await get(url)).toMatchObject({ status: 500 });
      expect(errors).toEqual([expect.any(TypeError)]);
      expect(errors[0].message).toMatch(/Expected `shouldCommit` to return true or false, got .*[Pp]romise/);
      expect(await ledger.stored()).toEqual([]);
    });

    it.each([[undefined], [null], [0], ['yes']])('takes %p for a mistake, and rolls back', async (value) => {
      const { url, errors } = await serve(write(200), { shouldCommit: (() => value) as never });
      expect(await get(url)).toMatchObject({ status: 500 });
      expect(errors).toEqual([expect.any(TypeError)]);
      expect(await ledger.stored()).toEqual([]);
    });
  });

  describe('when the handler has called setRollbackOnly()', () => {
    // Scenario 14.
    it('rolls back at the end, keeps the response, and statements still work until then', async () => {
      const { url, errors } = await serve(async (req, res) => {
        await insert(req, 'a');
        req.session.setRollbackOnly('dry run');
        await insert(req, 'b');
        res.json(await req.session('notes').orderBy('id').pluck('id'));
      });
      expect(await get(url)).toMatchObject({ status: 200, body: '["a","b"]' });
      expect(errors).toEqual([]);
      expect(await ledger.stored()).toEqual([]);
    });

    it('does so too if that was before the first statement', async () => {
      const { url } = await serve(async (req, res) => {
        req.session.setRollbackOnly();
        expect(req.session.outcome).toBe('unused');
        await insert(req, 'a');
        expect(req.session.outcome).toBe('open');
        res.status(201).end();
      });
      expect(await get(url)).toMatchObject({ status: 201 });
      expect(await ledger.stored()).toEqual([]);
    });

    it('needs no statement at all', async () => {
      const { knex, proxy } = await ledger.throughProxy();
      const { url } = await serve(
        (req, res) => {
          req.session.setRollbackOnly();
          res.status(201).end();
        },
        { knex },
      );
      expect(await get(url)).toMatchObject({ status: 201 });
      expect(proxy.connections()).toBe(0);
    });

    it('keeps a success though a statement failed: it is right as it is', async () => {
      const { url } = await serve(async (req, res) => {
        await insert(req, 'a');
        await insert(req, 'a').catch(() => req.session.setRollbackOnly('taken'));
        res.json({ available: false });
      });
      expect(await get(url)).toMatchObject({ status: 200, body: '{"available":false}' });
      expect(await ledger.stored()).toEqual([]);
    });

    it('does not even ask a deferred constraint', async () => {
      const { url } = await serve(async (req, res) => {
        await insert(req, 'a', 'fail');
        req.session.setRollbackOnly();
        res.sendStatus(200);
      });
      expect(await get(url)).toMatchObject({ status: 200 });
    });

    // Scenario 15.
    it('refuses commit() by name, with the reason as cause, and rolls back', async () => {
      const reason = new Error('not allowed');
      const { url, errors } = await serve(async (req) => {
        await insert(req, 'a');
        req.session.setRollbackOnly(reason);
        req.session.setRollbackOnly('later');
        await req.session.commit();
      });
      expect(await get(url)).toMatchObject({ status: 500 });
      expect(errors).toEqual([expect.any(SessionError)]);
      expect(errors[0]).toMatchObject({ code: 'ERR_ROLLBACK_ONLY', cause: reason });
      expect(await ledger.stored()).toEqual([]);
    });

    it('refuses commit() also before any statement', async () => {
      const { url } = await serve(async (req) => {
        req.session.setRollbackOnly();
        await req.session.commit();
      });
      expect(JSON.parse((await get(url)).body)).toMatchObject({ code: 'ERR_ROLLBACK_ONLY' });
    });

    it.each(['commit', 'rollback'] as const)('refuses it by name after %s()', async (end) => {
      const { url, errors } = await serve(async (req) => {
        await insert(req, 'a');
        await req.session[end]();
        req.session.setRollbackOnly();
      });
      expect(await get(url)).toMatchObject({ status: 500 });
      expect(errors[0]).toMatchObject({ code: 'ERR_SESSION_CLOSED', message: expect.stringContaining(`session.${end}()`) });
      expect(await ledger.stored()).toEqual(end === 'commit' ? ['a'] : []);
    });

    it('refuses it by name while commit() is under way, whose result stands', async () => {
      const { url } = await serve(async (req, res) => {
        await insert(req, 'a', 'wait');
        const held = await ledger.holdCommits();
        const committed = req.session.commit();
        await held.waiting();
        expect(() => req.session.setRollbackOnly()).toThrow('The session is closed');
        await held.release();
        await committed;
        res.json(req.session.outcome);
      });
      expect(await get(url)).toMatchObject({ status: 200, body: '"committed"' });
      expect(await ledger.stored()).toEqual(['a']);
    });
  });

  describe('when no statement was run', () => {
    it.each([200, 404, 500])('lets a %d go as it is', async (status) => {
      const { url, errors } = await serve((_req, res) => res.status(status).send('mine'));
      expect(await get(url)).toMatchObject({ status, body: 'mine' });
      expect(errors).toEqual([]);
    });

    it('has nothing to roll back for an error', async () => {
      const outcomes: unknown[] = [];
      const { url } = await serve(
        (req) => {
          outcomes.push(req.session.outcome);
          throw new Error('mine');
        },
        {
          errorHandlers: [
            sessionErrorHandler(),
            (_error, req, res, _next) => {
              outcomes.push(req.session.outcome);
              res.sendStatus(418);
            },
          ],
        },
      );
      expect(await get(url)).toMatchObject({ status: 418 });
      expect(outcomes).toEqual(['unused', 'unused']);
    });
  });
});
