import { type Session, type SessionOptions, sessionOptions, type WithSessionOptions, withSession } from 'express-knex-session';
import { mistaken } from './support/docs';
import { caught } from './support/knex';
import { failOnWarnings } from './support/warnings';
import { atRest, type Handler, sent, useBench } from './support/wire';

failOnWarnings();
const role = `clerk_${process.pid}_${Date.now()}`;
// Before the bench stops: hooks run in this order.
afterAll(() => bench.database.admin.raw(`DROP OWNED BY ${role}; DROP ROLE ${role}`));
// One connection: whatever a session leaves behind, the next one finds.
const bench = useBench({ pool: { min: 0, max: 1 } });

beforeAll(() =>
  bench.database.admin.raw(`
    ALTER TABLE items ADD tenant text DEFAULT current_setting('app.tenant', true);
    CREATE ROLE ${role};
    GRANT ALL ON items TO ${role};
    GRANT ALL ON SEQUENCE items_id_seq TO ${role}`),
);

const under =
  (options: SessionOptions, handler: Handler): Handler =>
  async (req, res, next) => {
    let refused: unknown;
    sessionOptions(options)(req, res, (error) => {
      refused = error;
    });
    if (refused) throw refused;
    return handler(req, res, next);
  };

const SEEN = "select current_setting('app.tenant', true) as tenant, current_user as role";
const seenIn = async (session: Session) => (await session.raw(SEEN)).rows[0];
const tenantIn = async (session: Session) => (await seenIn(session)).tenant;
const stored = () => bench.database.admin('items').orderBy('id').select('name', 'tenant');

describe('when a session has settings and a role', () => {
  const unsendable = {
    toPostgres(): never {
      throw new Error('not today');
    },
  } as never;
  const options: WithSessionOptions = { settings: { 'app.tenant': 'a', 'app.user': 7, 'app.is_admin': false }, role };

  it('puts them in place with BEGIN and the first statement, without a round trip more', async () => {
    let seen: unknown;
    const handler: Handler = async (req, res) => {
      seen = await seenIn(req.session);
      res.end();
    };
    await bench.answer(under(options, handler));
    expect(seen).toEqual({ tenant: 'a', role });
    const settings = ['$1, $2', '$3, $4', '$5, $6', '$7, $8'].map((pair) => `set_config(${pair}, true)`);
    expect(sent(bench.proxy)).toBe(`P(BEGIN;) B E P(SELECT ${settings.join(', ')}) B E P(${SEEN}) B D E S Q(COMMIT;)`);
    expect(bench.proxy.roundTrips()).toBe(2);
  });

  it.each<[string, (session: Session) => Promise<unknown>]>([
    ['a stream', async (session) => (await session.raw(SEEN).stream()[Symbol.asyncIterator]().next()).value],
    ['several statements in one raw', async (session) => (await session.raw(`select 1; ${SEEN}`))[1].rows[0]],
    ['a named statement', async (session) => (await session.raw(SEEN).options({ name: 'seen' })).rows[0]],
    ['a savepoint', (session) => session.transaction((savepoint) => seenIn(savepoint as Session))],
  ])('has them in place before the first statement, which is %s', async (_first, run) => {
    expect(await withSession(bench.knex, run, options)).toEqual({ tenant: 'a', role });
  });

  it.each<[string, (session: Session) => PromiseLike<unknown>]>([
    ['is empty', (session) => session.raw('')],
    ['has a value that cannot be sent', (session) => session.raw('select ?', [unsendable])],
  ])('has them in place for the next statement, when the first %s', async (_first, run) => {
    const seen = await withSession(bench.knex, async (session) => [await caught(run(session)), await seenIn(session)], options);
    expect(seen).toEqual([expect.any(Error), { tenant: 'a', role }]);
  });

  it('has them in the sessions of its hooks, too, with those that were set', async () => {
    const seen: unknown[] = [];
    const look = async (session: Session) =>
      seen.push((await session.raw("select concat(current_setting('app.tenant'), current_user) as seen")).rows);
    await bench.answer(
      under(options, async (req, res) => {
        await req.session.set({ 'app.tenant': 'set ' });
        req.session.beforeCommit(look);
        req.session.afterCommit(look);
        res.end();
      }),
    );
    expect(seen).toEqual(Array(2).fill([{ seen: `set ${role}` }]));
  });

  // A custom setting that was set before reads '' and not NULL: PostgreSQL.
  it.each<[string, (session: Session) => unknown]>([
    ['is committed', (session) => session('items').insert({ name: 'a' })],
    ['is rolled back', (session) => session('items').then(() => session.rollback())],
    ['fails at its first statement', (session) => session('nowhere')],
    ['fails at COMMIT', (session) => session('items').insert([{ name: 'twice' }, { name: 'twice' }])],
  ])('leaves nothing of them for the next session on the connection, when it %s (66)', async (_end, work) => {
    const pid = async (session: Session) => (await session.raw('select pg_backend_pid() as pid')).rows[0].pid;
    const before = await withSession(bench.knex, pid);
    await caught(withSession(bench.knex, async (session) => work(session), options));
    await atRest(bench.knex);
    expect(await withSession(bench.knex, async (session) => [await pid(session), await seenIn(session)])).toEqual([
      before,
      { tenant: '', role: expect.not.stringContaining('clerk') },
    ]);
  });

  it('keeps the role last, which may not set what the others do', async () => {
    const settings = { log_duration: 'on' };
    const seen = await withSession(
      bench.knex,
      async (session) => {
        await session.set({ log_min_messages: 'warning' });
        return (await seenIn(session)).role;
      },
      { role, settings },
    );
    expect(seen).toBe(role);
  });

  it('asks their functions at the first statement, once for each transaction, and for its own request', async () => {
    const asked: string[] = [];
    const handler = under(
      {
        settings: (req) => {
          asked.push(req.url);
          return { 'app.tenant': String(req.query['tenant']) };
        },
      },
      async (req, res) => {
        if (req.query['tenant']) res.json([await tenantIn(req.session), await tenantIn(req.session)]);
        else res.end();
      },
    );
    const url = bench.route(handler);
    const bodies = await Promise.all(['', '?tenant=a', '?tenant=b'].map(async (query) => (await fetch(url + query)).text()));
    expect(bodies).toEqual(['', '["a","a"]', '["b","b"]']);
    expect(asked).toHaveLength(2);
  });
});

const VALUE = /^Expected the value of 'app\.tenant' in `settings` to be a string, a number or a boolean, got /;
const secret = { token: 'secret' };
const wrongSettings: [string, unknown, RegExp][] = [
  ['a value that is null', { 'app.tenant': null }, VALUE],
  ['a value that is undefined', { 'app.tenant': undefined }, VALUE],
  ['a value that is an object', { 'app.tenant': secret }, VALUE],
  ['a value that is a promise', { 'app.tenant': Promise.resolve('secret') }, VALUE],
  ['a value that is a function', { 'app.tenant': () => 'secret' }, VALUE],
  ['a value that is no number', { 'app.tenant': Number.NaN }, VALUE],
  ['an empty name', { '': 'secret' }, /^A name in `settings` is empty\.$/],
  ['null', null, /^Expected `settings` to be an object .*, got null\.$/],
  ['an array', [['app.tenant', 'secret']], /^Expected `settings` to be an object .*, got Array\.$/],
  ['a Map, which has no properties', new Map([['app.tenant', 'secret']]), /^Expected `settings` to be an object .*, got Map\.$/],
  ['a string', 'secret', /^Expected `settings` to be an object .*, got a string\.$/],
  ['a promise', Promise.resolve({ 'app.tenant': 'secret' }), /^Expected `settings` .*, got Promise\. It must answer at once\.$/],
];
const wrongRoles: [string, unknown, RegExp][] = [
  ['null', null, /^Expected `role` to be the name of a role, got null\.$/],
  ['an empty name', '', /got an empty string\.$/],
  ['a promise', Promise.resolve('secret'), /got Promise\. It must answer at once\.$/],
];

describe('when there is something else in place of a setting or a role', () => {
  it.each<[string, SessionOptions, RegExp]>([
    ...wrongSettings.map(([name, value, message]): [string, SessionOptions, RegExp] => [
      name,
      { settings: () => mistaken(value) },
      message,
    ]),
    ['nothing', { settings: () => mistaken() }, /^The function `settings` has returned undefined\./],
    ...wrongRoles.map(([name, value, message]): [string, SessionOptions, RegExp] => [name, { role: () => mistaken(value) }, message]),
    ['no role', { role: () => mistaken() }, /^The function `role` has returned undefined\./],
  ])('refuses every statement by name, without the value, and any success: %s', async (_case, options, message) => {
    const refused: any[] = [];
    const answer = await bench.answer(
      under(options, async (req, res) => {
        for (const name of ['a', 'b']) refused.push(await caught(req.session('items').insert({ name })));
        res.status(201).end();
      }),
    );
    expect(refused).toMatchObject(Array(2).fill({ code: 'ERR_SESSION_OPTIONS', message: expect.stringMatching(message) }));
    expect(refused[0].message).not.toContain('secret');
    expect(answer.status).toBe(500);
    expect(bench.proxy.sql()).toEqual([]);
  });

  it.each([['nothing', undefined, /^Expected `settings` to be an object/] as (typeof wrongSettings)[0], ...wrongSettings])(
    'is refused by session.set(), and adds nothing: %s',
    async (_case, value, message) => {
      const refused = await withSession(bench.knex, async (session) => {
        const before = await caught(session.set(mistaken(value)));
        const tenant = await tenantIn(session);
        const savepoint = session.transaction((inner) => (inner as Session).set(mistaken(value)));
        return [before, await caught(session.set(mistaken(value))), await caught(savepoint), (await tenantIn(session)) === tenant];
      });
      const error = { code: 'ERR_SESSION_OPTIONS', message: expect.stringMatching(message) };
      expect(refused).toMatchObject([error, error, error, true]);
    },
  );

  it('takes an empty value for what it is', async () => {
    const settings = { search_path: '' };
    expect(await withSession(bench.knex, (session) => session.raw('show search_path'), { settings })).toMatchObject({
      rows: [{ search_path: '' }],
    });
  });
});

describe('when the server refuses a setting or the role', () => {
  const INSERT = "insert into public.items (name) values ('a')";
  const refusals: [string, WithSessionOptions, string][] = [
    ['a value of the wrong type', { settings: { 'app.tenant': 'a', statement_timeout: 'soon' } }, '22023'],
    ['a name that it does not know', { settings: { 'app.tenant': 'a', tenant: 'a' } }, '42704'],
    ['one that a transaction cannot change', { settings: { 'app.tenant': 'a', max_connections: 5 } }, '55P02'],
    ['a role that is none', { settings: { 'app.tenant': 'a' }, role: 'nobody_there' }, '22023'],
  ];
  it.each(refusals)('never runs a statement, names it, and keeps the connection: %s', async (_case, options, code) => {
    const pid = async (session: Session) => (await session.raw('select pg_backend_pid() as pid')).rows[0].pid;
    const before = await withSession(bench.knex, pid);
    const firsts: ((session: Session) => PromiseLike<unknown>)[] = [
      (session) => session.raw(INSERT),
      (session) => session.raw(`${INSERT}; select 1`),
      (session) => session.raw(`${INSERT} returning id`).stream().toArray(),
    ];
    for (const run of firsts) {
      const refused: any[] = [];
      const answer = await bench.answer(
        under(options, async (req, res) => {
          refused.push(await caught(run(req.session)), await caught(req.session('items').insert({ name: 'b' })));
          res.status(201).end();
        }),
      );
      expect(refused).toMatchObject(Array(2).fill({ code: 'ERR_SESSION_OPTIONS', cause: { code } }));
      expect(answer.status).toBe(500);
      expect(await withSession(bench.knex, seenIn)).toMatchObject({ role: expect.not.stringContaining('clerk') });
    }
    expect(await stored()).toEqual([]);
    expect(await withSession(bench.knex, pid)).toBe(before);
  });

  it('rolls back if session.set() was refused later, and nothing comes after it', async () => {
    const work = withSession(bench.knex, async (session) => {
      await session.raw(INSERT);
      await caught(session.set({ statement_timeout: 'soon' }));
      return caught(session.raw(INSERT));
    });
    expect(await caught(work)).toMatchObject({ code: 'ERR_TRANSACTION_ABORTED', cause: { code: '22023' } });
    expect(await stored()).toEqual([]);
  });
});

describe('when the settings of the middleware are an object that changes', () => {
  const now = { tenant: '' };
  const settings = {
    get 'app.tenant'() {
      return now.tenant;
    },
  };
  const changing = useBench({}, { settings });

  it('reads them for each request', async () => {
    for (const tenant of ['a', 'b']) {
      now.tenant = tenant;
      const { body } = await changing.answer(async (req, res) => res.end(JSON.stringify(await seenIn(req.session))));
      expect(JSON.parse(body).tenant).toBe(tenant);
    }
  });
});
