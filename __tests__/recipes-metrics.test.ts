import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import express, { type Express, type RequestHandler, Router } from 'express';
import * as expressKnexSession from 'express-knex-session';
import {
  type SessionChannel,
  type SessionMiddleware,
  type SessionOptions,
  sessionChannels,
  sessionErrorHandler,
  sessionMiddleware,
  type TransactionMessage,
  withSession,
} from 'express-knex-session';
import type { Knex } from 'knex';
import { Histogram, register } from 'prom-client';
import { type SessionMetrics, sessionMetrics } from '../example-app/metrics';
import { runExample } from './support/example-bench';
import { deferred } from './support/gated-app';
import { get, type Listening } from './support/http';
import { answerErrors, express5Flavour, insert, useLedger } from './support/ledger';
import { exampleIn, pageOf } from './support/pages';
import { eventually } from './support/pool';
import { scrape, startingWith } from './support/scrape';
import { root } from './support/typescript';
import { failOnWarnings } from './support/warnings';
import { ways } from './support/ways-to-settle';

/* The recipe is the file of the example app: it is tested here on an app that ends its sessions in each way. */
failOnWarnings();

const ledger = useLedger();
const measuring: SessionMetrics[] = [];
afterEach(() => {
  for (const { stop } of measuring.splice(0)) stop();
});

interface Measured extends Listening {
  sessions: SessionMiddleware;
}

async function measure(
  handler: RequestHandler,
  { knex = ledger.knex, ...options }: SessionOptions & { knex?: Knex } = {},
): Promise<Measured> {
  const sessions = sessionMiddleware(knex, { onError: () => {}, ...options });
  const metrics = sessionMetrics(knex, sessions);
  measuring.push(metrics);
  const app = express().get('/metrics', metrics.handler).use(sessions, handler, sessionErrorHandler(), answerErrors([]));
  return Object.assign(await ledger.listen(app), { sessions });
}

const settledIn = (series: Record<string, number>) => startingWith('db_sessions_settled_total', series);
const settledAs = (outcome: string, reason: string) => `db_sessions_settled_total{outcome="${outcome}",reason="${reason}"}`;

describe('the recipe of metrics', () => {
  it('is what the example app does', () => {
    expect(exampleIn('recipes/metrics', 'collect()')).toBe(readFileSync(join(root, 'example-app/metrics.ts'), 'utf8'));
  });

  it('asks for series that there are', async () => {
    const { url } = await measure(async (req, res) => void res.json(await insert(req, 'a')));
    await get(url);
    const there = Object.keys(await scrape(url)).map((series) => series.replace(/\{.*/, ''));

    const [, questions = ''] = pageOf('docs/recipes/metrics.md').split('## What to ask');
    const asked = new Set(questions.match(/\bdb_\w+/g));

    expect(asked.size).toBeGreaterThan(5);
    expect([...asked].filter((name) => !there.includes(name))).toEqual([]);
  });
});

describe('the recipe of metrics in an app', () => {
  it('answers in front of the sessions, whether or not the database does', async () => {
    const knex = ledger.pool({ connection: 'postgres://nobody@127.0.0.1:1/none' });
    const scope = {
      ...expressKnexSession,
      knex,
      app: express(),
      sessionMetrics(...args: Parameters<typeof sessionMetrics>) {
        measuring.push(sessionMetrics(...args));
        return measuring[0];
      },
    };
    const app: Express = await runExample(exampleIn('recipes/metrics', "get('/metrics'"), scope, 'app');
    const handler: RequestHandler = async (req, res) => void res.json(await req.session('notes'));
    app.use(handler, sessionErrorHandler(), answerErrors([]));
    const { url } = await ledger.listen(app);

    expect((await get(url)).status).toBe(503);
    expect(settledIn(await scrape(url))).toEqual({ [settledAs('unused', 'error')]: 1 });
  });
});

describe('the recipe of routes as labels', () => {
  it('has the pattern of the route, also of one that fails', async () => {
    const unsubscribe: (() => void)[] = [];
    const follow = (channel: SessionChannel<TransactionMessage>) => ({
      subscribe(listener: (message: TransactionMessage) => void): void {
        channel.subscribe(listener);
        unsubscribe.push(() => channel.unsubscribe(listener));
      },
    });
    const { acquire, settled } = sessionChannels;
    const scope = { Histogram, sessionChannels: { acquire: follow(acquire), settled: follow(settled) } };
    const byRoute = await runExample(exampleIn('recipes/metrics', 'baseUrl'), scope, 'heldByRoute');
    const accounts = Router().get('/:id', async (req, res) => {
      await req.session('notes');
      if (req.params.id === 'bad') throw new Error('no');
      res.end();
    });
    const { url } = await ledger.serve(express5Flavour, (app) => app.use('/accounts', accounts));
    for (const id of ['1', '2', 'bad']) await get(`${url}/accounts/${id}`);
    await withSession(ledger.knex, (session) => session('notes'));
    for (const stop of unsubscribe) stop();

    const { values } = await byRoute.get();
    const counts = values.filter(({ metricName }: { metricName: string }) => metricName.endsWith('_count'));
    expect(counts).toMatchObject([
      { labels: { route: 'GET /accounts/:id' }, value: 3 },
      { labels: { route: 'none' }, value: 1 },
    ]);
    register.clear();
  });
});

describe.each(ways)('when a request $name', ({ handler, options = {}, settled, destroyed = 0, isLeft = false }) => {
  it('is counted once, by its outcome and the reason, and timed once', async () => {
    const { url, sessions } = await measure(handler, { ...options, knex: ledger.pool() });
    const leaving = new AbortController();
    const answered = get(url, { signal: leaving.signal });
    if (isLeft) await eventually(() => expect(sessions.stats()).toMatchObject({ open: 1 }));
    if (isLeft) leaving.abort();
    await answered;

    await eventually(() => expect(sessions.stats()).toMatchObject({ open: 0, waiting: 0 }));
    const series = await scrape(url);

    expect(settledIn(series)).toEqual(Object.fromEntries(settled.map((labels) => [settledAs(...labels), 1])));
    const [[outcome] = []] = settled;
    for (const time of ['held', 'waited']) {
      expect(startingWith(`db_session_${time}_seconds_count`, series)).toEqual({
        [`db_session_${time}_seconds_count{outcome="${outcome}"}`]: settled.length,
      });
    }
    expect(series).toMatchObject({ db_connections_destroyed_total: destroyed, db_session_late_uses_total: 0 });
  });
});

describe('when a request gets no connection', () => {
  it('is timed as one that has waited, and has held none', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 } });
    const { url, sessions } = await measure(async (req, res) => void res.json(await insert(req, 'a')), { knex, acquireTimeout: 60 });
    const taken = await knex.transaction();
    await taken.raw('SELECT 1');

    expect((await get(url)).status).toBe(503);
    const series = await scrape(url);
    await taken.rollback();

    expect(settledIn(series)).toEqual({ [settledAs('unused', 'error')]: 1 });
    expect(series['db_session_waited_seconds_sum{outcome="unused"}']).toBeGreaterThan(0.055);
    expect(series['db_session_waited_seconds_bucket{le="0.05",outcome="unused"}']).toBe(0);
    expect(startingWith('db_session_held', series)).toEqual({});
    expect(series).toMatchObject({ db_pool_connections_used: 1, db_sessions_open: 0, db_sessions_waiting: 0 });
    expect(sessions.stats()).toEqual({ open: 0, waiting: 0, committed: 0, rolledBack: 0, unknown: 0 });
  });
});

describe('while a session holds the only connection', () => {
  it('is open, and the next ones wait', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 } });
    const [held, holding] = [deferred(), deferred()];
    const { url } = await measure(
      async (req, res) => {
        await req.session.raw('SELECT 1');
        if (req.path === '/first') {
          held.resolve();
          await holding.promise;
        }
        res.end();
      },
      { knex },
    );
    const startedAt = performance.now();
    const first = get(`${url}/first`);
    await held.promise;
    const heldAt = performance.now();
    const others = [get(url), get(url)];

    await eventually(async () =>
      expect(await scrape(url)).toMatchObject({
        db_sessions_open: 1,
        db_sessions_waiting: 2,
        db_pool_connections_used: 1,
        db_pool_connections_max: 1,
      }),
    );
    // Long enough to be seen in the sums.
    while (performance.now() - heldAt < 60) await scrape(url);
    const heldFor = (performance.now() - heldAt) / 1_000;
    holding.resolve();
    await Promise.all([first, ...others]);
    const tookAll = (performance.now() - startedAt) / 1_000;

    const series = await scrape(url);
    expect(series).toMatchObject({ db_sessions_open: 0, db_sessions_waiting: 0, db_pool_connections_used: 0 });
    expect(series['db_session_held_seconds_count{outcome="committed"}']).toBe(3);
    expect(series['db_session_held_seconds_bucket{le="0.05",outcome="committed"}']).toBe(2);
    expect(series['db_session_held_seconds_bucket{le="30",outcome="committed"}']).toBe(3);
    // One connection, one after the other.
    expect(series['db_session_held_seconds_sum{outcome="committed"}']).toBeGreaterThan(heldFor);
    expect(series['db_session_held_seconds_sum{outcome="committed"}']).toBeLessThan(tookAll);
    const waited = series['db_session_waited_seconds_sum{outcome="committed"}'] as number;
    expect(waited).toBeGreaterThan(heldFor);
    expect(waited).toBeLessThan(3 * tookAll);
  });
});

describe('after many requests', () => {
  it('agree with the counters of stats()', async () => {
    const { url, sessions } = await measure(
      async (req, res) => {
        const [, id = '', end] = req.path.split('/');
        await insert(req, id, end === 'fail' || end === 'die' ? end : undefined);
        res.status(end === 'bad' ? 400 : 200).end();
      },
      { knex: ledger.pool() },
    );
    const ends = ['ok', 'ok', 'ok', 'bad', 'bad', 'fail', 'die', 'fail'];
    await Promise.all(ends.map((end, index) => get(`${url}/${index}/${end}`)));

    const series = await scrape(url);

    const sum = (outcome: string) =>
      Object.entries(settledIn(series)).reduce((sum, [name, value]) => (name.includes(`"${outcome}"`) ? sum + value : sum), 0);
    const { committed, rolledBack, unknown } = sessions.stats();
    expect([sum('committed'), sum('rolled back'), sum('unknown')]).toEqual([committed, rolledBack, unknown]);
    expect([committed, rolledBack, unknown]).toEqual([3, 4, 1]);
  });
});

describe('when a session is used after its end', () => {
  it('is counted', async () => {
    const { url } = await measure(async (req, res) => {
      await insert(req, 'a');
      const { session } = req;
      res.once('close', () => session('notes').catch(() => {}));
      res.end();
    });
    await get(url);
    await eventually(async () => expect(await scrape(url)).toMatchObject({ db_session_late_uses_total: 1 }));
    expect(settledIn(await scrape(url))).toEqual({ [settledAs('committed', 'response')]: 1 });
  });
});

describe('with several pools in one process', () => {
  it('counts those of its own, withSession() included, until it is stopped', async () => {
    // Other files in this process may have left theirs.
    const subscribed = () => Object.values(sessionChannels).map((channel) => channel.hasSubscribers);
    const before = subscribed();
    const ours = ledger.pool();
    const theirs = ledger.pool();
    const handler: RequestHandler = async (req, res) => void res.json(await req.session('notes'));
    const [first, second] = [await measure(handler, { knex: ours }), await measure(handler, { knex: theirs })];
    await get(first.url);
    await withSession(ours, (session) => session('notes'));
    for (let i = 0; i < 3; i++) await get(second.url);

    expect(settledIn(await scrape(first.url))).toEqual({ [settledAs('committed', 'response')]: 2 });
    expect(settledIn(await scrape(second.url))).toEqual({ [settledAs('committed', 'response')]: 3 });
    expect(first.sessions.stats()).toMatchObject({ committed: 1 });

    for (const { stop } of measuring.splice(0)) stop();
    expect(subscribed()).toEqual(before);
    await get(first.url);
    expect(settledIn(await scrape(first.url))).toEqual({ [settledAs('committed', 'response')]: 2 });
  });
});
