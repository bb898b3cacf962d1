import { retryable, type SessionOptions, withSession } from 'express-knex-session';
import request from 'supertest';
import { get, listen, RawClient } from './support/http';
import { caught, comparable, gate, type Handler, useTestedApp } from './support/tested-app';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const tested = useTestedApp();

const store: Handler = async (req, res) => {
  await req.session('items').insert({ name: req.path.slice(1) });
  res.sendStatus(201);
};

describe('when a test and its requests write', () => {
  // The second run of this finds the first one's work, if that is still there.
  it.each(['first', 'second'])('shows it to them and to nobody else, and the %s test begins with nothing (69)', async () => {
    const app = tested.app(store);
    expect(await tested.names()).toEqual([]);

    await request(app).post('/a').expect(201);
    await tested.knex('items').insert({ name: 'b' });
    await request(app).post('/c').expect(201);

    const list = await tested.answer(async (req, res) => res.json(await tested.names(req.session)));
    expect(list.body).toEqual(['a', 'b', 'c']);
    expect(await tested.names()).toEqual(['a', 'b', 'c']);
    expect(await tested.stored()).toEqual([]);
  });

  it('takes it all back at rollback(), and the database is as it was (69)', async () => {
    await tested.own.admin('items').insert({ name: 'before' });
    try {
      await request(tested.app(store)).post('/a').expect(201);
      await tested.answer(async (req, res) => res.json(await req.session('items').where({ name: 'before' }).del()));
      await tested.knex.schema.alterTable('items', (table) => table.string('more'));
      expect(await tested.names()).toEqual(['a']);
      await tested.kit.rollback();

      expect(await tested.stored()).toEqual(['before']);
      expect(await tested.own.admin.schema.hasColumn('items', 'more')).toBe(false);
    } finally {
      await tested.own.admin('items').del();
    }
    await tested.kit.begin();
  });

  it('runs everything on one connection', async () => {
    const pids = new Set<number>();
    const pid = async (knex = tested.knex) => pids.add((await knex.raw('SELECT pg_backend_pid() AS pid')).rows[0].pid);
    await pid();
    for (let i = 0; i < 3; i++) {
      const answer = await tested.answer(async (req, res) => {
        await pid(req.session);
        res.end();
      });
      expect(answer.status).toBe(200);
    }
    await withSession(tested.knex, (session) => pid(session));
    expect(pids.size).toBe(1);
  });
});

describe('when a request is rolled back', () => {
  const ends: [string, number, Handler][] = [
    ['answers with 400', 400, (_req, res) => res.status(400).end()],
    [
      'throws',
      500,
      () => {
        throw new Error('no');
      },
    ],
    ['rejects', 500, () => Promise.reject(new Error('no'))],
    ['calls next(error)', 418, (_req, _res, next) => next(Object.assign(new Error('no'), { status: 418 }))],
    ['is rollback-only', 200, (req, res) => [req.session.setRollbackOnly(), res.end()]],
    ['fails in a statement', 500, (req) => req.session('items').insert({ name: 'bad' })],
  ];
  it.each(ends)('leaves nothing if it %s, and all that came before stays (69)', async (_, status, end) => {
    await tested.knex('items').insert({ name: 'of the test' });
    await request(tested.app(store)).post('/before').expect(201);

    const answer = await tested.answer(async (req, res, next) => {
      await req.session('items').insert({ name: 'lost' });
      await req.session('items').where({ name: 'before' }).update({ name: 'changed' });
      expect(await tested.names(req.session)).toEqual(['changed', 'lost', 'of the test']);
      await end(req, res, next);
    });

    expect(answer.status).toBe(status);
    expect(await tested.names()).toEqual(['before', 'of the test']);
    await request(tested.app(store)).post('/after').expect(201);
    expect(await tested.names()).toEqual(['after', 'before', 'of the test']);
  });
});

describe('when a statement of the test itself fails', () => {
  it('takes nothing with it, and the next one runs', async () => {
    await tested.knex('items').insert({ name: 'a' });
    await expect(tested.knex('items').insert({ name: 'bad' })).rejects.toMatchObject({ code: '23514', constraint: 'not_bad' });
    await expect(tested.knex.raw("INSERT INTO items (name) VALUES ('x'); SELECT 1 / 0")).rejects.toMatchObject({ code: '22012' });
    await tested.knex('items').insert({ name: 'b' });
    expect(await tested.names()).toEqual(['a', 'b']);
  });
});

describe('when the app has other transactions than req.session', () => {
  it('runs withSession() on the Knex of the kit, committed and rolled back', async () => {
    const answer = await tested.answer(async (_req, res) => {
      await withSession(tested.knex, (session) => session('items').insert({ name: 'a' }));
      const failed = withSession(tested.knex, async (session) => {
        await session('items').insert({ name: 'b' });
        throw new RangeError('no');
      });
      await expect(failed).rejects.toThrow(RangeError);
      res.json(await tested.names());
    });
    expect(answer.body).toEqual(['a']);
    expect(await tested.names()).toEqual(['a']);
  });

  it('runs knex.transaction(), with savepoints, committed and rolled back', async () => {
    const answer = await tested.answer(async (_req, res) => {
      await tested.knex.transaction(async (trx) => {
        await trx('items').insert({ name: 'a' });
        await expect(trx.transaction((inner) => inner('items').insert({ name: 'bad' }))).rejects.toMatchObject({ code: '23514' });
        await trx.transaction((inner) => inner('items').insert({ name: 'b' }));
      });
      const failed = tested.knex.transaction(async (trx) => {
        await trx('items').insert({ name: 'c' });
        throw new RangeError('no');
      });
      await expect(failed).rejects.toThrow(RangeError);
      const trx = await tested.knex.transaction();
      await trx('items').insert({ name: 'd' });
      await trx.rollback();
      res.end();
    });
    expect(answer.status).toBe(200);
    expect(await tested.names()).toEqual(['a', 'b']);
  });

  it("stores a root statement, whatever comes of the request's session", async () => {
    const answer = await tested.answer(async (req, res) => {
      await tested.knex('items').insert({ name: 'at once' });
      await req.session('items').insert({ name: 'lost' });
      res.status(409).end();
    });
    expect(answer.status).toBe(409);
    expect(await tested.names()).toEqual(['at once']);
  });

  it('reads streams, to their end and not, of the test and of a request', async () => {
    await tested.knex.raw("INSERT INTO items (name) SELECT 'n' || lpad(i::text, 3, '0') FROM generate_series(1, 200) i");
    const read = async (knex = tested.knex, most = Number.POSITIVE_INFINITY) => {
      let count = 0;
      for await (const _ of knex('items').stream()) if (++count >= most) break;
      return count;
    };
    expect([await read(), await read(tested.knex, 3)]).toEqual([200, 3]);
    const answer = await tested.answer(async (req, res) => {
      const counts = [await read(req.session), await read(req.session, 3)];
      await req.session('items').insert({ name: 'after' });
      res.json(counts);
    });
    expect(answer.body).toEqual([200, 3]);
    expect(await tested.names()).toHaveLength(201);
  });
});

describe('when bytes of the response leave before the commit', () => {
  it("stores at the end with commitAt: 'end', and not if the constraint fails then", async () => {
    const streams =
      (names: string[]): Handler =>
      async (req, res) => {
        res.type('text').write('[');
        for (const name of names) {
          await req.session('items').insert({ name });
          res.write(`"${name}",`);
        }
        res.end('0]');
      };
    const streamed = await tested.answer(streams(['a', 'b']), { commitAt: 'end' });
    expect(streamed.text).toBe('["a","b",0]');
    expect(await tested.names()).toEqual(['a', 'b']);
    const server = await listen(tested.app(streams(['c', 'c']), { commitAt: 'end', onError() {} }));
    expect(await get(server.url)).toMatchObject({ status: 200, complete: false });
    await server.close();
    expect(await tested.names()).toEqual(['a', 'b']);
  });

  it("shows the test what is stored after the response, with commitAt: 'finish'", async () => {
    const late: Handler = async (req, res) => {
      await req.session('items').insert({ name: 'late' });
      res.end();
    };
    await tested.answer(late, { commitAt: 'finish' });
    expect(await tested.names()).toEqual(['late']);
    // And a test that ends at once waits for it.
    await tested.answer(async (req, res) => [await req.session('items').del(), res.end()], { commitAt: 'finish' });
  });
});

describe('when the client disconnects', () => {
  const disconnect = async (handler: Handler, isThere: () => Promise<unknown>, options?: SessionOptions) => {
    const server = await listen(tested.app(handler, options));
    try {
      const client = (await RawClient.connect(server.port)).get('/left');
      await isThere();
      await client.destroy();
      expect((await request(tested.app(store)).post('/after')).status).toBe(201);
    } finally {
      await server.close();
    }
  };

  it('cancels the statement that runs, rolls back, and serves the next request', async () => {
    let failed: any;
    const sleep: Handler = async (req) => {
      await req.session('items').insert({ name: 'lost' });
      failed = await caught(req.session.raw('SELECT pg_sleep(60)'));
    };
    await disconnect(sleep, () => tested.isOnServer('SELECT pg_sleep'));
    expect(failed).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
    expect(await tested.names()).toEqual(['after']);
    expect(await tested.running('SELECT pg_sleep')).toEqual([]);
  });

  it('rolls back when none runs', async () => {
    const reached = gate();
    const idle: Handler = async (req) => {
      await req.session('items').insert({ name: 'lost' });
      reached.open();
    };
    await disconnect(idle, () => reached.opened);
    expect(await tested.names()).toEqual(['after']);
  });

  it("lets the handler finish with onDisconnect: 'finish'", async () => {
    const [reached, left] = [gate(), gate()];
    const goesOn: Handler = async (req, res) => {
      res.once('close', left.open);
      await req.session('items').insert({ name: 'kept' });
      reached.open();
      await left.opened;
      res.end();
    };
    await disconnect(goesOn, () => reached.opened, { onDisconnect: 'finish' });
    expect(await tested.names()).toEqual(['after', 'kept']);
  });
});

describe('when a request takes too long', () => {
  it.each<[string, Handler]>([
    ['a statement', (req) => req.session.raw('SELECT pg_sleep(60)')],
    ['its handler', () => new Promise(() => {})],
  ])('answers 503 by transactionTimeout for %s, and the next one is served', async (_, hang) => {
    const hangs: Handler = async (req, res, next) => {
      await req.session('items').insert({ name: 'lost' });
      await hang(req, res, next);
    };
    const answer = await tested.answer(hangs, { transactionTimeout: 100 });
    expect(answer).toMatchObject({ status: 503, body: { code: 'ERR_SESSION_TIMEOUT' } });
    await request(tested.app(store)).post('/after').expect(201);
    expect(await tested.names()).toEqual(['after']);
  });
});

describe('when the same app runs without the kit', () => {
  const handlers: [string, Handler][] = [
    ['a success', async (req, res) => res.status(201).json(await req.session('items').insert({ name: 'a' }).returning('name'))],
    ['no statement', (_req, res) => res.json({ ok: true })],
    ['an error of the driver', (req) => req.session('items').insert({ name: 'bad' })],
    ['a raw COMMIT', (req) => req.session.raw('COMMIT')],
    ['a savepoint', async (req, res) => res.json(await req.session.transaction((trx) => trx('items').insert({ name: 'a' })))],
    ['another unit of work', async (req, res) => [await req.session('items'), res.json(req.session.outcome)]],
  ];
  it.each(handlers)('answers %s in the same way', async (_, handler) => {
    const answers = await tested.answers([handler]);
    expect(answers.tested.map(comparable)).toEqual(answers.inProduction.map(comparable));
  });

  it('takes bodies of requests', async () => {
    const app = tested.app(async (req, res) => {
      await req.session('items').insert(req.body);
      res.status(201).json(await tested.names(req.session));
    });
    const items = Array.from({ length: 1_000 }, (_, i) => ({ name: `name ${i}` }));
    const { status, body } = await request(app).post('/items').send(items);
    expect({ status, count: body.length }).toEqual({ status: 201, count: 1_000 });
  });
});

describe('when a handler is retryable', () => {
  it('runs it again, as in production', async () => {
    let attempt = 0;
    const answer = await tested.answer(
      retryable(async (req, res) => {
        await req.session('items').insert({ name: `attempt ${++attempt}` });
        if (attempt === 1) throw Object.assign(new Error('not serializable'), { code: '40001' });
        res.sendStatus(201);
      }),
    );
    expect([answer.status, await tested.names()]).toEqual([201, ['attempt 2']]);
  });
});
