import { type Session, SessionError, withSession } from 'express-knex-session';
import { failOnWarnings } from './support/warnings';
import { atRest, type Handler, isSql, spoil, useBench } from './support/wire';

failOnWarnings();

const insert = (session: Session, name: string) => session('items').insert({ name });
const readAll = async (rows: AsyncIterable<unknown>) => {
  for await (const _ of rows);
};
const caught = (work: PromiseLike<unknown>): Promise<any> =>
  Promise.resolve(work).then(
    () => undefined,
    (error) => error,
  );

describe('when a statement fails', () => {
  const bench = useBench();

  it("passes the driver's error on as it is: the same object for the handler, the error handlers, and executionPromise", async () => {
    let thrown: unknown;
    let session!: Session;
    await bench.answer(async (req) => {
      session = req.session;
      try {
        await insert(session, 'bad');
      } catch (error) {
        thrown = error;
        throw error;
      }
    });
    expect(thrown).toMatchObject({ code: '23514', severity: 'ERROR', constraint: 'items_name_check' });
    expect(thrown).not.toBeInstanceOf(SessionError);
    expect(bench.errors[0]).toBe(thrown);
    expect(await caught(session.executionPromise)).toBe(thrown);
  });

  it('gives it the fields that Knex gives it, and no other', async () => {
    const ofKnex = await caught(bench.knex.transaction((trx) => trx('items').insert({ name: 'bad' })));
    const ofFirst = await caught(withSession(bench.knex, (session) => insert(session, 'bad').then(() => {})));
    const ofSecond = await caught(
      withSession(bench.knex, async (session) => {
        await session.select(1);
        await insert(session, 'bad');
      }),
    );
    const fields = ({ detail: _, ...error }: any) => ({ ...error, message: error?.message });
    expect(fields(ofFirst)).toEqual(fields(ofKnex));
    expect(fields(ofSecond)).toEqual(fields(ofKnex));
    expect(ofFirst.message).toBe(ofKnex.message);
    expect(ofSecond.message).toBe(ofKnex.message);
  });

  it('explains each later failure by the first one, whatever came between (26)', async () => {
    const answer = await bench.answer(async (req, res) => {
      const first = await caught(insert(req.session, 'bad'));
      for (const work of [insert(req.session, 'a'), req.session.raw('select 1/0'), req.session.schema.hasTable('items')]) {
        const later = await caught(work);
        expect(later).toMatchObject({ code: '25P02' });
        expect(later.cause).toBe(first);
      }
      const ofStream = await caught(readAll(req.session('items').stream()));
      expect(ofStream).toMatchObject({ code: '25P02' });
      expect(ofStream.cause).toBe(first);
      const ofSavepoint = await caught(req.session.transaction(async () => {}));
      expect(ofSavepoint).toMatchObject({ code: '25P02' });
      expect(ofSavepoint.cause).toBe(first);
      res.end();
      return first;
    });
    expect(bench.errors).toMatchObject([{ code: 'ERR_TRANSACTION_ABORTED', cause: { code: '23514' } }]);
    expect(answer.status).toBe(500);
  });

  it('names the error of a stream when it is swallowed', async () => {
    let ofStream: unknown;
    await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      ofStream = await caught(readAll(req.session.raw('select 1 / (3 - n) from generate_series(1, 5) n').stream()));
      res.end();
    });
    expect(ofStream).toMatchObject({ code: '22012' });
    expect(bench.errors).toMatchObject([{ code: 'ERR_TRANSACTION_ABORTED' }]);
    expect(bench.errors[0].cause).toBe(ofStream);
    expect(await bench.stored()).toEqual([]);
  });

  it('is forgiven by the savepoint that it is rolled back to (26)', async () => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'before');
      const first = await caught(req.session.transaction((trx) => insert(trx as Session, 'bad')));
      expect(first).toMatchObject({ code: '23514' });
      await insert(req.session, 'after');
      const second = await caught(req.session.transaction((trx) => trx.raw('select 1/0')));
      expect(second).toMatchObject({ code: '22012' });
      expect(second.cause).toBeUndefined();
      res.status(201).end();
    });
    expect(answer.status).toBe(201);
    expect(await bench.stored()).toEqual(['before', 'after']);
  });

  it('names the first error of the transaction as it is, not one that a savepoint has taken back', async () => {
    let outer: unknown;
    await bench.answer(async (req, res) => {
      await caught(req.session.transaction((trx) => trx.raw('select 1/0')));
      outer = await caught(insert(req.session, 'bad'));
      res.end();
    });
    expect(bench.errors).toMatchObject([{ code: 'ERR_TRANSACTION_ABORTED' }]);
    expect(bench.errors[0].cause).toBe(outer);
  });

  it('is not a reason to refuse a success if the server has not heard of it', async () => {
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      expect(await caught(req.session('items').where({ name: undefined }))).toBeInstanceOf(Error);
      res.status(201).end();
    });
    expect(answer.status).toBe(201);
    expect(await bench.stored()).toEqual(['a']);
  });

  it('leaves the handler free to answer for itself: an error status keeps its body', async () => {
    const answer = await bench.answer(async (req, res) => {
      const error = await caught(insert(req.session, 'bad'));
      res.status(422).json({ constraint: error.constraint });
    });
    expect(answer).toMatchObject({ status: 422, body: '{"constraint":"items_name_check"}' });
    expect(bench.errors).toEqual([]);
  });
});

describe('when an error is of our own making', () => {
  const bench = useBench({ pool: { min: 0, max: 1, acquireTimeoutMillis: 200 } });
  // In SQL text and as a value: neither may be in a message or in a log.
  const secret = 'tellnobody';
  const sql = `select '${secret}' as ${secret}`;
  const use = (session: Session) => session.raw(sql);

  const makers: Record<string, Handler> = {
    ERR_TRANSACTION_ABORTED: async (req, res) => {
      await caught(req.session.raw(`select '${secret}'::int`));
      res.end();
    },
    ERR_COMMIT_UNKNOWN: async (req, res) => {
      await use(req.session);
      bench.proxy.onFrontend((message) => (isSql(message, 'COMMIT;') ? 'cut-before' : undefined));
      res.end();
    },
    ERR_SESSION_UNAVAILABLE: async (req, res) => {
      bench.proxy.onFrontend((message) => {
        if (isSql(message, 'BEGIN;')) spoil(message);
      });
      await use(req.session);
      res.end();
    },
    ERR_SESSION_CLOSED: async (req, res) => {
      await use(req.session);
      await req.session.commit();
      await use(req.session);
      res.end();
    },
    ERR_SAVEPOINT_OPEN: async (req, res) => {
      await use((await req.session.transaction()) as Session);
      res.end();
    },
    ERR_ROLLBACK_ONLY: async (req, res) => {
      await use(req.session);
      req.session.setRollbackOnly(secret);
      await req.session.commit();
      res.end();
    },
    ERR_TRANSACTION_CONTROL: async (req, res) => {
      await req.session.raw(`commit /* ${secret} */`);
      res.end();
    },
    ERR_SESSION_DESTROY: async (req) => {
      await use(req.session);
      req.session.destroy();
    },
    ERR_NOT_A_LOGIN_SESSION: async (req) => {
      await use(req.session);
      (req.session as any).save(secret);
    },
  };

  it.each(Object.entries(makers))('holds no SQL and no value in its message, nor does the log: %s', async (code, handler) => {
    await bench.answer(handler);
    expect(bench.errors).toMatchObject([{ code }]);
    expect(bench.errors[0]).toBeInstanceOf(SessionError);
    const { cause: _, ...shown } = bench.errors[0];
    expect(`${bench.errors[0].stack} ${JSON.stringify(shown)}`.split('\n    at ')[0]).not.toContain(secret);
    expect(bench.reported).toEqual([]);

    bench.proxy.onFrontend(undefined);
    // Knex tells at the next acquire why it has dropped a connection.
    await bench.answer(async (req, res) => res.json(await req.session('items')));
    expect(bench.logged.join('\n')).not.toContain(secret);
    await atRest(bench.knex);
  });

  it('is a full pool: the cause tells, the message holds no SQL', async () => {
    await bench.knex.transaction(async () => {
      const answer = await bench.answer(async (req, res) => {
        await use(req.session);
        res.end();
      });
      expect(answer.status).toBe(503);
    });
    expect(bench.errors).toMatchObject([{ code: 'ERR_SESSION_UNAVAILABLE', cause: { name: 'KnexTimeoutError' } }]);
    expect(bench.errors[0].message).not.toContain(secret);
  });
});

describe('when the server speaks another language', () => {
  const bench = useBench();

  it('tells errors apart by their codes, not by their words', async () => {
    // This server has English messages only: the wire translates the severity, as lc_messages would.
    bench.proxy.onBackend((message) => {
      const start = message.type === 'E' ? message.bytes.indexOf('SERROR\0') : -1;
      if (start >= 0) message.bytes.write('SqaghI', start);
    });
    await bench.database.admin('items').insert({ name: 'a' });
    const answer = await bench.answer(async (req, res) => {
      await insert(req.session, 'a');
      res.end();
    });
    expect(answer.status).toBe(500);
    expect(bench.errors).toMatchObject([{ code: '23505', severity: 'qaghI' }]);
    expect(bench.proxy.connections()).toBe(1);
  });
});
