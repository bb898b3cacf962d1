import { get, RawClient } from './support/http';
import { controlOf, flavours, type Handler, insert, useLedger } from './support/ledger';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

describe.each(flavours)('on $version', (flavour) => {
  const serve = ledger.serving(flavour);

  /** With what began and ended transactions on the wire. */
  const serveCounted = async (handler: Handler) => {
    const { knex, proxy } = await ledger.throughProxy();
    const served = await serve(handler, { knex });
    return { ...served, control: () => controlOf(proxy) };
  };

  // Scenario 16.
  describe('when the handler has committed', () => {
    it.each([200, 303, 400, 404, 500])('leaves it so if it then answers %d, and ends nothing twice', async (status) => {
      const { url, control } = await serveCounted(async (req, res) => {
        await insert(req, 'a');
        await req.session.commit();
        expect(req.session.outcome).toBe('committed');
        expect(req.session.isCompleted()).toBe(true);
        res.status(status).send('mine');
      });
      expect(await get(url)).toMatchObject({ status, body: 'mine' });
      expect(await ledger.stored()).toEqual(['a']);
      expect(control()).toEqual(['BEGIN;', 'COMMIT;']);
    });

    it('leaves it so if it then throws, and passes the error on', async () => {
      const { url, errors, control } = await serveCounted(async (req) => {
        await insert(req, 'a');
        await req.session.commit();
        throw new Error('mine');
      });
      expect(await get(url)).toMatchObject({ status: 500, body: '{"message":"mine"}' });
      expect(errors).toHaveLength(1);
      expect(await ledger.stored()).toEqual(['a']);
      expect(control()).toEqual(['BEGIN;', 'COMMIT;']);
    });

    it('has given the connection back by then', async () => {
      const { url } = await serve(async (req, res) => {
        await insert(req, 'a');
        await req.session.commit();
        res.json(poolUsage(ledger.knex).used);
      });
      expect(await get(url)).toMatchObject({ body: '0' });
    });

    it('leaves it so if the client leaves before the response', async () => {
      let finish: (() => void) | undefined;
      const committed = new Promise<void>((resolve) => {
        finish = resolve;
      });
      const { port, control } = await serveCounted(async (req) => {
        await insert(req, 'a');
        await req.session.commit();
        finish?.();
      });
      const client = await RawClient.connect(port);
      client.get('/');
      await committed;
      await client.reset();
      await ledger.isClean();
      expect(await ledger.stored()).toEqual(['a']);
      expect(control()).toEqual(['BEGIN;', 'COMMIT;']);
    });

    it('resolves a second commit() as the first, and refuses a rollback()', async () => {
      const { url, control } = await serveCounted(async (req, res) => {
        await insert(req, 'a');
        await req.session.commit();
        await req.session.commit();
        await expect(req.session.rollback()).rejects.toMatchObject({ code: 'ERR_SESSION_CLOSED' });
        res.json(req.session.outcome);
      });
      expect(await get(url)).toMatchObject({ status: 200, body: '"committed"' });
      expect(control()).toEqual(['BEGIN;', 'COMMIT;']);
    });
  });

  describe('when the handler has rolled back', () => {
    it.each([200, 201, 409])('leaves it so if it then answers %d, and ends nothing twice', async (status) => {
      const { url, errors, control } = await serveCounted(async (req, res) => {
        await insert(req, 'a');
        await req.session.rollback();
        expect(req.session.outcome).toBe('rolled back');
        res.status(status).send('mine');
      });
      expect(await get(url)).toMatchObject({ status, body: 'mine' });
      expect(errors).toEqual([]);
      expect(await ledger.stored()).toEqual([]);
      expect(control()).toEqual(['BEGIN;', 'ROLLBACK']);
    });

    it('refuses a commit()', async () => {
      const { url } = await serve(async (req) => {
        await insert(req, 'a');
        await req.session.rollback();
        await req.session.commit();
      });
      expect(JSON.parse((await get(url)).body)).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
      expect(await ledger.stored()).toEqual([]);
    });
  });

  // Scenario 17.
  describe.each(['commit', 'rollback'] as const)('when a statement comes after %s()', (end) => {
    const uses: [string, (req: Parameters<Handler>[0]) => unknown][] = [
      ['a query', (req) => insert(req, 'late')],
      ['raw()', (req) => req.session.raw('SELECT 1')],
      ['a savepoint', (req) => req.session.transaction((trx) => trx.raw('SELECT 1'))],
      ['a schema statement', (req) => req.session.schema.hasTable('notes')],
      [
        'a stream',
        async (req) => {
          for await (const _ of req.session('notes').stream());
        },
      ],
    ];
    it.each(uses)('refuses %s by name', async (_, use) => {
      const { url } = await serve(async (req) => {
        await insert(req, 'a');
        await req.session[end]();
        await use(req);
      });
      expect(JSON.parse((await get(url)).body)).toMatchObject({
        code: 'ERR_SESSION_CLOSED',
        message: expect.stringContaining(`session.${end}()`),
      });
      expect(await ledger.stored()).toEqual(end === 'commit' ? ['a'] : []);
    });
  });

  describe('when commit() fails', () => {
    const commitAndAnswer =
      (status: number): Handler =>
      async (req, res) => {
        await insert(req, 'a', 'fail');
        const failure = await req.session.commit().then(
          () => undefined,
          (error) => error,
        );
        expect(failure).toMatchObject({ code: '23514' });
        expect(req.session.outcome).toBe('rolled back');
        expect(poolUsage(ledger.knex).used).toBe(0);
        res.status(status).cookie('kind', 'mine').send('mine');
      };

    it('rejects, and keeps what the handler answers to that', async () => {
      const { url, errors } = await serve(commitAndAnswer(409));
      expect(await get(url)).toMatchObject({ status: 409, body: 'mine', headers: { 'set-cookie': ['kind=mine; Path=/'] } });
      expect(errors).toEqual([]);
      expect(await ledger.stored()).toEqual([]);
    });

    it.each([200, 302])('lets no %d leave all the same', async (status) => {
      const { url, errors } = await serve(commitAndAnswer(status));
      const answer = await get(url);
      expect(answer).toMatchObject({ status: 500 });
      expect(answer.headers['set-cookie']).toBeUndefined();
      expect(errors).toEqual([expect.objectContaining({ code: '23514' })]);
      expect(await ledger.stored()).toEqual([]);
    });

    it('passes its error on if the handler does not catch it', async () => {
      const { url, errors } = await serve(async (req) => {
        await insert(req, 'a', 'fail');
        await req.session.commit();
      });
      expect(await get(url)).toMatchObject({ status: 500 });
      expect(errors).toEqual([expect.objectContaining({ code: '23514' })]);
    });

    it('lets setRollbackOnly(), called before, win', async () => {
      const { url } = await serve(async (req, res) => {
        await insert(req, 'a', 'fail');
        req.session.setRollbackOnly();
        await expect(req.session.commit()).rejects.toMatchObject({ code: 'ERR_ROLLBACK_ONLY' });
        res.sendStatus(200);
      });
      expect(await get(url)).toMatchObject({ status: 200 });
      expect(await ledger.stored()).toEqual([]);
    });
  });

  describe('when commit() is not awaited', () => {
    it('still lets the response leave only after COMMIT', async () => {
      const held = await ledger.holdCommits();
      const { port } = await serve(async (req, res) => {
        await insert(req, 'a', 'wait');
        void req.session.commit();
        res.sendStatus(201);
      });
      const client = await RawClient.connect(port);
      client.get('/');
      await held.waiting();
      expect(client.received).toBe('');
      await held.release();
      await client.readUntil('201 Created');
      expect(await ledger.stored()).toEqual(['a']);
      await client.destroy();
    });

    it('answers with the error of its COMMIT', async () => {
      const { url, errors } = await serve(async (req, res) => {
        await insert(req, 'a', 'fail');
        req.session.commit().catch(() => {});
        res.sendStatus(201);
      });
      expect(await get(url)).toMatchObject({ status: 500 });
      expect(errors).toEqual([expect.objectContaining({ code: '23514' })]);
    });
  });

  describe('when the handler commits a session that it has not used', () => {
    it('sends nothing to the database, and closes the session', async () => {
      const { knex, proxy } = await ledger.throughProxy();
      const { url } = await serve(
        async (req, res) => {
          await req.session.commit();
          expect(req.session.outcome).toBe('unused');
          await expect(insert(req, 'late')).rejects.toMatchObject({ code: 'ERR_SESSION_CLOSED' });
          res.sendStatus(200);
        },
        { knex },
      );
      expect(await get(url)).toMatchObject({ status: 200 });
      expect(proxy.connections()).toBe(0);
    });
  });
});
