import { CommitUnknownError, type Session } from 'express-knex-session';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred, type Handler, isSql, spoil, useBench } from './support/wire';

failOnWarnings();

const insert = (session: Session, name: string) => session('items').insert({ name });
const insertOne: Handler = async (req, res) => {
  await insert(req.session, 'a');
  res.status(201).set('Location', '/items/1').end();
};

describe('when COMMIT fails', () => {
  const bench = useBench();
  const connectionsSeen = () => new Set(bench.proxy.frontend.map(({ connection }) => connection)).size;

  it("passes on the driver's error of a deferred constraint, stores nothing, and keeps the connection (19)", async () => {
    await bench.database.admin('items').insert({ name: 'a' });
    let session!: Session;
    const answer = await bench.answer((req, res, next) => {
      session = req.session;
      return insertOne(req, res, next);
    });
    expect(answer.status).toBe(500);
    expect(answer.headers.location).toBeUndefined();
    expect(bench.errors).toMatchObject([{ code: '23505', severity: 'ERROR' }]);
    expect(session.outcome).toBe('rolled back');
    expect(await bench.stored()).toEqual(['a']);

    await bench.answer(async (req, res) => res.json(await req.session('items')));
    expect(connectionsSeen()).toBe(1);
    expect(bench.proxy.sql()).not.toContain('ROLLBACK');
  });

  it('passes on 40001 of a serialization failure, and keeps the connection (27)', async () => {
    const serializable = (session: Session) => session.raw('set transaction isolation level serializable');
    const other = await bench.database.admin.transaction(undefined, { isolationLevel: 'serializable' });
    await other('items').where({ name: 'mine' });
    const answer = await bench.answer(async (req, res) => {
      await serializable(req.session);
      await req.session('items').where({ name: 'theirs' });
      await insert(req.session, 'mine');
      await other('items').insert({ name: 'theirs' });
      await other.commit();
      res.status(201).end();
    });
    expect(bench.proxy.sql().at(-1)).toBe('COMMIT;');
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: '40001' }]);
    expect(await bench.stored()).toEqual(['theirs']);

    await bench.answer(async (req, res) => res.json(await req.session('items')));
    expect(connectionsSeen()).toBe(1);
  });

  it('destroys a connection that it leaves in its transaction (23)', async () => {
    bench.proxy.onFrontend((message) => {
      if (isSql(message, 'COMMIT;') || isSql(message, 'ROLLBACK')) spoil(message);
    });
    const answer = await bench.answer(insertOne);
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: '42601' }]);
    bench.proxy.onFrontend(undefined);

    expect((await bench.answer(insertOne)).status).toBe(201);
    expect(connectionsSeen()).toBe(2);
    expect(await bench.stored()).toEqual(['a']);
  });

  it("rejects the handler's own commit() with the same error", async () => {
    await bench.database.admin('items').insert({ name: 'a' });
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      await expect(req.session.commit()).rejects.toMatchObject({ code: '23505' });
      await expect(insert(req.session, 'b')).rejects.toMatchObject({ code: 'ERR_SESSION_CLOSED' });
      res.status(409).end();
    });
    expect(answer.status).toBe(409);
    expect(await bench.stored()).toEqual(['a']);
  });
});

describe('when the connection is lost while COMMIT is in flight (22)', () => {
  const bench = useBench();

  async function expectUnknown(handler: Handler = insertOne): Promise<void> {
    let session!: Session;
    const answer = await bench.answer((req, res, next) => {
      session = req.session;
      return handler(req, res, next);
    });
    expect(answer.status).toBe(500);
    expect(JSON.parse(answer.body)).toMatchObject({ code: 'ERR_COMMIT_UNKNOWN' });
    expect(answer.headers.location).toBeUndefined();
    expect(bench.errors).toEqual([expect.any(CommitUnknownError)]);
    expect(bench.errors[0].cause).toBeInstanceOf(Error);
    expect(bench.errors[0].message).not.toMatch(/rolled back|rollback/i);
    expect(session.outcome).toBe('unknown');
    expect(bench.proxy.sql().filter((sql) => sql === 'COMMIT;')).toHaveLength(1);
    expect(poolUsage(bench.knex).used).toBe(0);

    bench.proxy.onFrontend(undefined);
    bench.proxy.onBackend(undefined);
    const next = await bench.answer(async (req, res) => res.json(await req.session('items').count()));
    expect(next.status).toBe(200);
  }

  it('says so if the server has not received it', async () => {
    bench.proxy.onFrontend((message) => (isSql(message, 'COMMIT;') ? 'cut-before' : undefined));
    await expectUnknown();
    expect(await bench.stored()).toEqual([]);
  });

  it('says so if the server has acted on it, and its answer is lost', async () => {
    bench.proxy.onFrontend((message) => (isSql(message, 'COMMIT;') ? 'cut-after' : undefined));
    await expectUnknown();
    await eventually(async () => expect(await bench.stored()).toEqual(['a']));
  });

  it('says so if the answer is cut off on its way', async () => {
    bench.proxy.onBackend((message) => (message.type === 'C' && message.text === 'COMMIT' ? 'cut-before' : undefined));
    await expectUnknown();
    expect(await bench.stored()).toEqual(['a']);
  });

  it('says so if only the end of the answer is lost: the tag alone is no promise to rely on', async () => {
    let isCommitted = false;
    bench.proxy.onBackend((message) => {
      if (isCommitted) return 'cut-before';
      isCommitted = message.type === 'C' && message.text === 'COMMIT';
      return undefined;
    });
    await expectUnknown();
    expect(await bench.stored()).toEqual(['a']);
  });

  it('says so if the answer is an error of which the end is lost: FATAL or not, nobody knows', async () => {
    await bench.database.admin('items').insert({ name: 'a' });
    let hasFailed = false;
    bench.proxy.onBackend((message) => {
      if (hasFailed) return 'cut-before';
      hasFailed = message.type === 'E';
      return undefined;
    });
    await expectUnknown();
  });

  it('says so if the answer is one to something else', async () => {
    bench.proxy.onFrontend((message) => {
      if (isSql(message, 'COMMIT;')) message.bytes.write('SELECT;', message.bytes.indexOf('COMMIT;'));
    });
    await expectUnknown();
    expect(await bench.stored()).toEqual([]);
  });

  describe('because the server ends the connection', () => {
    beforeAll(() =>
      bench.database.admin.raw(`
        CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
          IF NEW.name = 'waits' THEN PERFORM pg_advisory_xact_lock(1); END IF;
          IF NEW.name LIKE 'raises %' THEN RAISE EXCEPTION 'raised' USING ERRCODE = split_part(NEW.name, ' ', 2); END IF;
          RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON items DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION at_commit()`),
    );

    it('says so', async () => {
      const lock = await bench.database.admin.transaction();
      await lock.raw('SELECT pg_advisory_xact_lock(1)');
      const inFlight = deferred();
      bench.proxy.onFrontend((message) => {
        if (isSql(message, 'COMMIT;')) inFlight.resolve();
      });
      const killed = inFlight.promise.then(async () => {
        await eventually(async () => expect(await lock('pg_locks').where({ locktype: 'advisory', granted: false })).toHaveLength(1));
        await bench.terminate(bench.held());
        await lock.rollback();
      });
      await expectUnknown(async (req, res) => {
        await insert(req.session, 'waits');
        res.status(201).end();
      });
      await killed;
      expect(bench.errors[0].cause).toMatchObject({ code: '57P01' });
      expect(await bench.stored()).toEqual([]);
    });

    it('does not say so if COMMIT is only cancelled: that is an error as any other, and the connection lives', async () => {
      const lock = await bench.database.admin.transaction();
      await lock.raw('SELECT pg_advisory_xact_lock(1)');
      const cancelled = eventually(async () => {
        // Of this database: other test files have locks, too.
        const here = lock('pg_locks').whereRaw('database = (SELECT oid FROM pg_database WHERE datname = current_database())');
        const [waiting] = await here.where({ locktype: 'advisory', granted: false });
        await lock.raw('SELECT pg_cancel_backend(?)', [waiting.pid]);
      });
      const answer = await bench.answer(async (req, res) => {
        await insert(req.session, 'waits');
        res.status(201).end();
      });
      await cancelled;
      await lock.rollback();
      expect(answer.status).toBe(500);
      expect(bench.errors).toMatchObject([{ code: '57014' }]);
      expect(poolUsage(bench.knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 });
      expect(await bench.stored()).toEqual([]);
    });

    it('says so if the error is 40003, statement completion unknown, on a connection that lives (hazard 35)', async () => {
      await expectUnknown(async (req, res) => {
        await insert(req.session, 'raises 40003');
        res.status(201).end();
      });
      expect(bench.errors[0].cause).toMatchObject({ code: '40003' });
    });

    it.each(['57P01', '08006', '25P02', 'XX000'])('does not say so for an error %s on a connection that lives', async (code) => {
      const answer = await bench.answer(async (req, res) => {
        await insert(req.session, `raises ${code}`);
        res.status(201).end();
      });
      expect(answer.status).toBe(500);
      expect(bench.errors).toMatchObject([{ code, severity: 'ERROR' }]);
      expect(await bench.stored()).toEqual([]);
    });
  });
});

describe('when the driver gives up waiting for the answer to COMMIT', () => {
  const bench = useBench((url) => ({ connection: { connectionString: url, query_timeout: 200 } as never }));

  it('is unknown too, and the connection is destroyed', async () => {
    const answered = deferred();
    bench.proxy.onBackend((message) => (message.type === 'C' && message.text === 'COMMIT' ? answered.promise : undefined));
    const answer = await bench.answer(insertOne);
    answered.resolve();
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: 'ERR_COMMIT_UNKNOWN', cause: { message: 'Query read timeout' } }]);
    expect(await bench.stored()).toEqual(['a']);
    bench.proxy.reset();
    bench.proxy.onBackend(undefined);
    expect((await bench.answer(async (req, res) => res.json(await req.session('items')))).status).toBe(200);
    expect(new Set(bench.proxy.frontend.filter(({ type }) => type !== 'X').map(({ connection }) => connection))).toEqual(new Set([2]));
  });
});
