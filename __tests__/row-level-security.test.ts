import { getSession, type Session, type SessionOptions, sessionMiddleware, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { keepAliveAgent, RawClient, request } from './support/http';
import { caught, outers } from './support/knex';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { atRest, type Handler, isSql, spoil, useBench } from './support/wire';

failOnWarnings();

const role = `tenant_${process.pid}_${Date.now()}`;
// Before the bench stops: hooks run in this order.
afterAll(() => bench.database.admin.raw(`DROP OWNED BY ${role}; DROP ROLE ${role}`));
const policy: SessionOptions = { settings: (req) => ({ 'app.tenant': String(req.query['tenant']) }), role };
const bench = useBench({}, policy);

beforeAll(() =>
  bench.database.admin.raw(`
    CREATE ROLE ${role};
    CREATE TABLE notes (id serial PRIMARY KEY, tenant text DEFAULT current_setting('app.tenant', true), text text CHECK (text <> 'bad'));
    ALTER TABLE notes ENABLE ROW LEVEL SECURITY;
    CREATE POLICY own ON notes USING (tenant = current_setting('app.tenant'));
    CREATE TABLE written (name text, tenant text DEFAULT current_setting('app.tenant', true), role text DEFAULT current_user);
    GRANT ALL ON notes, written, items TO ${role};
    GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO ${role}`),
);
beforeEach(() => bench.database.admin.raw('TRUNCATE notes, written'));

const SEEN = "select current_setting('app.tenant', true) as tenant, current_user as role";
const seenIn = async (session: Knex) => (await session.raw(SEEN)).rows[0];

describe('when the group of BEGIN, settings and first statement is hit on its way', () => {
  const INSERT = 'insert into "written" ("name") values ($1)';
  const messages = ['BEGIN;', 'SELECT set_config($1, $2, true), set_config($3, $4, true)', INSERT];
  const faults = ['spoiled', 'cut off', 'killed'] as const;
  const cases = messages.flatMap((sql) => faults.map((fault) => [sql, fault] as const));

  it.each(cases)('runs no statement without its settings: %s is %s', async (sql, fault) => {
    let hits = 0;
    let begun: number | undefined;
    bench.proxy.onFrontend((message) => {
      // What is left of the connection that the test before has broken is none of this one's.
      if (isSql(message, 'BEGIN;')) begun = message.connection;
      if (hits > 0 || message.connection !== begun || !isSql(message, sql)) return undefined;
      hits++;
      if (fault === 'killed') return bench.terminate(bench.held());
      if (fault === 'spoiled') spoil(message);
      return fault === 'cut off' ? 'cut-before' : undefined;
    });
    const url = bench.route(async (req, res) => {
      await req.session('written').insert({ name: 'first' });
      await req.session('written').insert({ name: 'second' });
      res.status(201).end();
    });
    expect((await request(`${url}?tenant=a`)).status).toBeGreaterThanOrEqual(500);
    expect(hits).toBe(1);
    await bench.rest();
    expect(await bench.database.admin('written')).toEqual([]);

    expect((await request(`${url}?tenant=b`)).status).toBe(201);
    expect(await bench.database.admin('written')).toEqual(['first', 'second'].map((name) => ({ name, tenant: 'b', role })));
  });
});

describe('when the server cancels whatever runs, again and again', () => {
  it('stores no row without its settings, in 250 groups', async () => {
    const groups = 250;
    const url = `${bench.database.url}?application_name=target`;
    const knex = bench.database.knex({ connection: url, pool: { min: 0, max: 4 }, log: { warn() {}, error() {} } });
    await bench.database.admin.raw('DROP TABLE IF EXISTS calm; CREATE TABLE calm ()');
    const storm = bench.database.admin
      .raw(`
        DO $$ BEGIN
          WHILE NOT EXISTS (SELECT FROM calm) LOOP
            PERFORM pg_stat_clear_snapshot();
            PERFORM pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'target';
          END LOOP;
        END $$`)
      .then(() => {});
    const ends: Record<string, number> = {};
    // A storm that misses shows nothing.
    const hasHit = () => ends['57014'] && (ends['ERR_SESSION_UNAVAILABLE'] || ends['ERR_SESSION_OPTIONS']);
    let count = 0;
    const worker = async () => {
      while (count < (hasHit() ? groups : 20 * groups)) {
        const name = String(count++);
        const options = { settings: { 'app.tenant': name }, role };
        // By turns in one group, and apart: several statements are sent after the settings have been answered.
        const insert = (session: Session) =>
          Number(name) % 4 === 0 ? session.raw(`insert into written values ('${name}'); select 1`) : session('written').insert({ name });
        const error = await withSession(knex, insert, options).catch((error) => error);
        const end = error?.code ?? 'committed';
        ends[end] = (ends[end] ?? 0) + 1;
      }
    };
    try {
      await Promise.all(Array.from({ length: 4 }, worker));
    } finally {
      await bench.database.admin.raw('INSERT INTO calm DEFAULT VALUES');
      await storm;
    }
    const written = await bench.database.admin('written');
    expect(written.filter(({ name, tenant, role: as }) => name !== tenant || as !== role)).toEqual([]);
    expect(hasHit()).toBeTruthy();
    expect(written.length).toBeGreaterThan(0);
    await atRest(knex);
  });
});

describe('when two tenants share a pool of two connections', () => {
  it('shows no tenant a row of the other, and stores none without a tenant, in 1,000 requests with errors, aborts and kills (67)', async () => {
    const requests = 1_000;
    /** Whose rows a session has seen, by the session's tenant. */
    const seen = { a: new Set<string>(), b: new Set<string>() };
    const whenBegun = new Map<string, () => void>();
    // Without the proxy, which has nothing to do here.
    const knex = bench.database.knex({ pool: { min: 0, max: 2 }, log: { warn() {}, error() {} } });
    const sessions = sessionMiddleware(knex, { ...policy, property: 'db' });
    const work: Handler = async (req, res) => {
      const { tenant, id, end } = req.query as Record<string, string> as { tenant: 'a' | 'b'; id: string; end: string };
      const session = getSession(req, 'db');
      const notes = () => session('notes');
      const look = async () => {
        for (const { tenant: whose } of await notes().select('tenant').orderBy('id', 'desc').limit(20)) seen[tenant].add(String(whose));
      };
      await (end === 'write first' ? notes().insert({ text: id }) : look());
      if (end === 'throw') throw new Error('of the handler');
      if (end === 'savepoint') {
        await caught(session.transaction((savepoint) => savepoint('notes').insert({ text: 'bad' })));
      } else if (end === 'stream') {
        for await (const row of notes().select('tenant').limit(20).stream()) seen[tenant].add(row.tenant);
      }
      if (end !== 'write first') await notes().insert({ text: end === 'fail' ? 'bad' : id });
      if (end === 'foreign') await notes().insert({ text: id, tenant: tenant === 'a' ? 'b' : 'a' });
      if (end === 'abort') {
        whenBegun.get(id)?.();
        await caught(session.raw('select pg_sleep(5)'));
        await notes().insert({ text: id });
      }
      await look();
      res.status(end === 'refuse' ? 409 : 201).end();
    };
    const url = bench.route((req, res, next) =>
      sessions(req, res, (error?: unknown) => (error ? next(error) : Promise.resolve(work(req, res, next)).catch(next))),
    );

    const ends = [
      'write first',
      'write',
      'throw',
      'write',
      'savepoint',
      'stream',
      'fail',
      'write',
      'foreign',
      'abort',
      'refuse',
      ...Array(5).fill('write'),
    ];
    const told: Record<string, string[]> = {};
    const agent = keepAliveAgent({ maxSockets: 20 });
    let begun = 0;
    const worker = async () => {
      while (begun < requests) {
        const number = begun++;
        if (number % 20 === 0) await kill();
        const end = ends[number % ends.length] as string;
        const path = `${url}?tenant=${number % 2 ? 'a' : 'b'}&id=${number}&end=${encodeURIComponent(end)}`;
        const answer = end === 'abort' ? await abort(path, String(number)) : `${(await request(path, { agent })).status}`;
        told[answer] ??= [];
        told[answer].push(String(number));
      }
    };
    let kills = 0;
    const kill = async () => {
      const { rows } = await bench.database.admin.raw(`
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND application_name <> 'tests' AND state <> 'idle' LIMIT 1`);
      kills += rows.length;
    };
    const abort = async (path: string, id: string): Promise<string> => {
      const { port, pathname, search } = new URL(path);
      const client = await RawClient.connect(Number(port));
      const isBegun = new Promise<void>((resolve) => whenBegun.set(id, resolve));
      client.get(pathname + search);
      await Promise.race([isBegun, client.readUntil('\r\n\r\n').catch(() => {})]);
      return client.reset().then(() => 'aborted');
    };
    await Promise.all(Array.from({ length: 20 }, worker));
    agent.destroy();
    await atRest(knex);

    expect(seen).toEqual({ a: new Set(['a']), b: new Set(['b']) });
    const notes: { tenant: string; text: string }[] = await bench.database.admin('notes');
    expect(notes.filter(({ tenant, text }) => tenant !== (Number(text) % 2 ? 'a' : 'b'))).toEqual([]);
    const stored = notes.map(({ text }) => text);
    const { 201: created = [], ...others } = told;
    expect(stored).toEqual(expect.arrayContaining(created));
    // Of the others, only those whose COMMIT was killed may be there.
    const unknown = bench.errors.filter(({ code }) => code === 'ERR_COMMIT_UNKNOWN').length;
    expect(stored.length - created.length).toBeLessThanOrEqual(unknown);
    expect(kills).toBeGreaterThan(5);
    expect(Object.keys(others)).toEqual(expect.arrayContaining(['409', '500', 'aborted']));
    expect(bench.errors.map(({ code }) => code)).toEqual(expect.arrayContaining(['42501', '23514']));
  }, 40_000);
});

describe.each(outers)('when sessions are savepoints in %s', (_kind, begin) => {
  const inOuter = <T>(work: (outer: Knex.Transaction) => Promise<T>) =>
    begin(bench.knex, async (outer) => {
      await outer.raw("select set_config('app.tenant', 'outer', true)");
      return work(outer);
    });
  const options = { settings: { 'app.tenant': 'a', 'app.other': 'x' }, role };

  it('has its settings and role, and puts back what was there before, whatever its end', async () => {
    const seen = await inOuter(async (outer) => {
      const seen = [await withSession(outer, seenIn, options), await seenIn(outer)];
      await caught(
        withSession(outer, async (session) => seen.push(await seenIn(session)) && Promise.reject(new Error('of the work')), options),
      );
      seen.push(await seenIn(outer));
      await caught(withSession(outer, (session) => session('nowhere'), options));
      return [...seen, await seenIn(outer)];
    });
    const inside = { tenant: 'a', role };
    const outside = { tenant: 'outer', role: expect.not.stringContaining('tenant_') };
    expect(seen).toEqual([inside, outside, inside, outside, outside]);
  });

  it('puts back what session.set() has changed, before its first statement and after', async () => {
    const seen = await inOuter(async (outer) => {
      await withSession(outer, async (session) => {
        await session.set({ 'app.other': 'first' });
        await session.raw('select 1');
        await session.set({ 'app.tenant': 'later', role });
        await session.transaction((savepoint) => (savepoint as Session).set({ 'app.third': 'savepoint' }));
      });
      const others = await outer.raw("select current_setting('app.other', true) as other, current_setting('app.third', true) as third");
      return [await seenIn(outer), others.rows[0]];
    });
    expect(seen).toEqual([
      { tenant: 'outer', role: expect.not.stringContaining('tenant_') },
      { other: '', third: '' },
    ]);
  });

  it('runs no statement if the server refuses a setting, and leaves the outer transaction alone', async () => {
    await inOuter(async (outer) => {
      const work = withSession(outer, (session) => session('written').insert({ name: 'a' }), { settings: { statement_timeout: 'soon' } });
      expect(await caught(work)).toMatchObject({ cause: { code: '22023' } });
      await outer('written').insert({ name: 'outer' });
    });
    await eventually(async () => expect(await bench.database.admin('written').pluck('name')).toEqual(['outer']));
  });
});
