import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { type IncomingMessage, get as nodeGet } from 'node:http';
import { sessionChannels } from 'express-knex-session';
import type { Knex } from 'knex';
import { createApp } from '../example-app/app';
import { closeServer } from '../example-app/close-server';
import { configFor } from '../example-app/database';
import type { LiveRequest } from '../example-app/live/follower';
import { migrate } from '../example-app/migrations';
import { ALICE, BOB, seedIfEmpty, WORLD } from '../example-app/seed';
import { createDatabase, type TestDatabase } from './support/database';
import { get, type Listening, listen, post, RawClient } from './support/http';
import { eventually, poolUsage } from './support/pool';

/* What the server tells the live page, and what the routes of its buttons do. The page itself: example-app-live-page.test.ts. */
let database: TestDatabase;
let pool: Knex;
let ledger: ReturnType<typeof createApp>;
let http: Listening;
const logged: unknown[] = [];

beforeAll(async () => {
  database = await createDatabase();
  pool = database.knex(configFor(database.url));
  await migrate(pool);
  await seedIfEmpty(pool);
  ledger = createApp(pool, { logError: (error) => logged.push(error) });
  http = await listen(ledger.app);
});

beforeEach(() => {
  logged.length = 0;
});

afterEach(() => eventually(() => expect(poolUsage(pool)).toMatchObject({ used: 0, pendingAcquires: 0 })));

afterAll(async () => {
  await http.close();
  await database.drop();
});

describe('when the page is opened', () => {
  it('is HTML whose files the app has itself, and none comes from elsewhere', async () => {
    const page = await get(`${http.url}/`);
    expect(page).toMatchObject({ status: 200, headers: { 'content-type': 'text/html; charset=utf-8', 'cache-control': 'no-store' } });

    const wanted = [...page.body.matchAll(/(?:href|src)="([^"]+)"/g)].map(([, url]) => url as string).filter((url) => url !== 'data:,');
    const types = new Map<string, string>();
    for (const path of wanted) {
      const file = await get(new URL(path, http.url).href);
      expect(file).toMatchObject({ status: 200, headers: { 'cache-control': 'no-store' } });
      types.set(path, String(file.headers['content-type']));
      expect(file.body).not.toMatch(/https?:/);
      for (const [, name] of file.body.matchAll(/from '\.\/([^']+)'/g)) {
        const path = `/live/${name}`;
        if (!wanted.includes(path)) wanted.push(path);
      }
    }

    expect(Object.fromEntries(types)).toMatchObject({
      '/live/page.css': 'text/css; charset=utf-8',
      '/live/page.mjs': 'text/javascript; charset=utf-8',
      '/live/timeline.mjs': 'text/javascript; charset=utf-8',
    });
  });
});

describe('when nobody watches', () => {
  it('listens to no channel: not before the first, and not after the last', async () => {
    expect(whoListens()).toEqual([]);
    const [first, second] = [await Watcher.of(http.url), await Watcher.of(http.url)];
    expect(whoListens()).toEqual(['acquire', 'open', 'settle', 'settled', 'late', 'destroyed']);

    first.leave();
    await makeTransfer();
    await second.until(({ phase }) => phase === 'done');
    second.leave();

    await eventually(() => expect(whoListens()).toEqual([]));
  });
});

describe('when somebody watches', () => {
  it('says hello first: the size of the pool, and how the sessions stand', async () => {
    await watching(async ({ hello }) => {
      expect(hello).toEqual({ at: expect.any(Number), poolSize: 5, sessions: ledger.sessions.stats(), requests: [] });
    });
  });

  it('tells of a request from its beginning to its end', async () => {
    await watching(async (watcher) => {
      const { headers } = await makeTransfer();

      const last = await watcher.until(({ phase }) => phase === 'done');

      expect(watcher.phases()).toEqual(['running', 'waiting', 'holding', 'settling', 'responding', 'done']);
      expect(last).toEqual({
        id: headers['x-request-id'],
        method: 'POST',
        route: '/transfers',
        at: expect.any(Number),
        phase: 'done',
        decision: 'commit',
        outcome: 'committed',
        reason: 'response',
        waitedMs: expect.any(Number),
        heldMs: expect.any(Number),
        statements: 2,
        bytesHeld: expect.any(Number),
        status: 201,
      });
      const times = watcher.requests.map(({ at }) => at);
      expect(times).toEqual(times.toSorted((a, b) => a - b));
    });
  });

  it('tells of one that needs no connection, and of none that the page looks things up with', async () => {
    await watching(async (watcher) => {
      await get(`${http.url}/transfers/${randomUUID()}`, { headers: { 'live-page': 'hidden' } });
      await get(`${http.url}/`);
      await get(`${http.url}/health`);

      expect(await watcher.until(({ phase }) => phase === 'done')).toMatchObject({ route: '/health', outcome: 'none', status: 200 });
      expect(watcher.phases()).toEqual(['running', 'done']);
    });
  });

  it('tells the status also if the response has left before COMMIT, of what was only read', async () => {
    await watching(async (watcher) => {
      await get(`${http.url}/accounts/${ALICE}`);

      expect(await watcher.until(({ phase }) => phase === 'done')).toMatchObject({ outcome: 'committed', status: 200 });
      expect(watcher.phases().at(-1)).toBe('done');
    });
  });

  it('tells no values', async () => {
    await watching(async (watcher) => {
      const id = randomUUID();
      await makeTransfer({ id, memo: 'for Bob’s eyes only' });
      await get(`${http.url}/transfers/${id}?token=secret`);

      await watcher.until(({ phase, route }) => phase === 'done' && route === '/transfers/:id');
      for (const value of [id, ALICE, 'eyes only', 'secret']) expect(watcher.text).not.toContain(value);
    });
  });

  it('tells whoever comes later what is under way', async () => {
    await watching(async (watcher) => {
      const answer = post(`${http.url}/live/demo/slow`, { id: randomUUID(), ms: 300 });
      await watcher.until(({ phase }) => phase === 'holding');

      await watching(async (other) => {
        expect(other.hello.requests).toMatchObject([{ route: '/live/demo/slow', phase: 'holding', outcome: 'none' }]);
        await answer;
        expect(await other.until(({ phase }) => phase === 'done')).toMatchObject({ outcome: 'committed', status: 201 });
      });
      await watching(async (last) => expect(last.hello.requests).toEqual([]));
    });
  });
});

describe('when a button sends what goes wrong', () => {
  it('a COMMIT that fails: tells of the 201 that became a 409', async () => {
    await watching(async (watcher) => {
      const id = randomUUID();

      const { status } = await makeTransfer({ id, from: ALICE, to: BOB, amount: 999_999_999_999 });

      expect(status).toBe(409);
      const last = await watcher.until(({ phase }) => phase === 'done');
      expect(last).toMatchObject({ decision: 'commit', outcome: 'rolled back', reason: 'error', error: '23514', status: 409 });
      expect(await isStored(id)).toBe(false);
    });
  });

  it('an error that is swallowed: the 201 becomes a 500, and nothing is stored', async () => {
    await watching(async (watcher) => {
      const id = randomUUID();

      const { status } = await post(`${http.url}/live/demo/swallowed`, { id });

      expect(status).toBe(500);
      const last = await watcher.until(({ phase }) => phase === 'done');
      expect(last).toMatchObject({ outcome: 'rolled back', error: 'ERR_TRANSACTION_ABORTED', status: 500 });
      expect(logged).toMatchObject([{ code: 'ERR_TRANSACTION_ABORTED', cause: { code: '23505' } }]);
      expect(await isStored(id)).toBe(false);
    });
  });

  it('a client that goes away: it is done when its statement is cancelled, and nothing is stored', async () => {
    await watching(async (watcher) => {
      const id = randomUUID();
      const leaving = new AbortController();
      const answer = post(`${http.url}/live/demo/slow`, { id, ms: 3_000 }, { signal: leaving.signal });
      await eventually(async () => expect(await sleeping()).toHaveLength(1));

      leaving.abort();
      await answer;

      const last = await watcher.until(({ phase }) => phase === 'done');
      expect(last).toMatchObject({ outcome: 'rolled back', reason: 'disconnect' });
      expect(last).not.toHaveProperty('status');
      expect(watcher.phases()).toEqual(['running', 'waiting', 'holding', 'settling', 'done']);
      expect(await sleeping()).toEqual([]);
      expect(await isStored(id)).toBe(false);
      expect(logged).toEqual([]);
    });
  });

  it('twenty at once: five hold a connection, the others wait, and all are stored', async () => {
    await watching(async (watcher) => {
      const ids = Array.from({ length: 20 }, () => randomUUID());

      const { body } = await post(`${http.url}/live/demo/crowd`, { ids }, { headers: { 'live-page': 'hidden' } });

      expect(JSON.parse(body)).toEqual({ statuses: Array(20).fill(201) });
      await eventually(() => expect(watcher.requests.filter(({ phase }) => phase === 'done')).toHaveLength(20));
      expect(watcher.most('holding', 'settling')).toBe(5);
      expect(watcher.most('waiting')).toBeGreaterThan(10);
      expect(await database.admin('transfers').whereIn('id', ids)).toHaveLength(20);
    });
  });

  it('a slow reader: its connection is back before it has read anything', async () => {
    await watching(async (watcher) => {
      const client = (await RawClient.connect(http.port)).pause().get('/live/demo/large');

      expect(await watcher.until(({ phase }) => phase === 'responding')).toMatchObject({ outcome: 'committed', statements: 1 });
      expect(poolUsage(pool).used).toBe(0);
      expect(watcher.phases()).not.toContain('done');

      await client.resume().readUntil((received) => received.length > 30_000_000);
      expect(await watcher.until(({ phase }) => phase === 'done')).toMatchObject({ status: 200 });
      await client.destroy();
    });
  });
});

describe('when a client goes away while the response is sent', () => {
  it('tells no status: what it got was not whole', async () => {
    await watching(async (watcher) => {
      const client = (await RawClient.connect(http.port)).pause().get('/live/demo/large');
      await watcher.until(({ phase }) => phase === 'responding');

      await client.reset();

      const last = await watcher.until(({ phase }) => phase === 'done');
      expect(last).toMatchObject({ outcome: 'committed' });
      expect(last).not.toHaveProperty('status');
    });
  });
});

describe('when the server stops while the page is open', () => {
  it('ends the stream at once, and cuts whoever asks for it again', async () => {
    const { app, sessions, endStreams } = createApp(pool);
    const stopping = await listen(app);
    const watcher = await Watcher.of(stopping.url);
    const since = performance.now();

    const closed = closeServer(stopping.server, sessions, { lingerMs: 60_000 });
    endStreams();

    await closed;
    expect(performance.now() - since).toBeLessThan(5_000);
    await eventually(() => expect(watcher.isComplete()).toBe(true));
    const again = await listen(app);
    expect(await get(`${again.url}/live/events`)).toMatchObject({ status: 0, complete: false });
    await again.close();
  });
});

/** A client of the events, as the page is one. */
class Watcher {
  text = '';

  static async of(url: string): Promise<Watcher> {
    const [response] = (await once(nodeGet(`${url}/live/events`, { agent: false }), 'response')) as [IncomingMessage];
    expect(response.headers).toMatchObject({ 'content-type': 'text/event-stream; charset=utf-8', 'cache-control': 'no-store' });
    const watcher = new Watcher(response);
    await eventually(() => expect(watcher.events('hello')).toHaveLength(1));
    return watcher;
  }

  private constructor(private readonly response: IncomingMessage) {
    response.setEncoding('utf8').on('data', (chunk: string) => {
      this.text += chunk;
    });
    response.on('error', () => {}); // leave()
  }

  get hello(): { requests: LiveRequest[] } {
    return this.events('hello')[0] as { requests: LiveRequest[] };
  }

  get requests(): LiveRequest[] {
    return this.events('request') as LiveRequest[];
  }

  phases(): LiveRequest['phase'][] {
    return this.requests.map(({ phase }) => phase).filter((phase, i, all) => phase !== all[i - 1]);
  }

  /** How many requests have been in one of these phases at the same time. */
  most(...phases: LiveRequest['phase'][]): number {
    const now = new Map<string, LiveRequest['phase']>();
    return Math.max(
      ...this.requests.map(({ id, phase }) => {
        now.set(id, phase);
        return [...now.values()].filter((phase) => phases.includes(phase)).length;
      }),
    );
  }

  until(isWanted: (request: LiveRequest) => boolean): Promise<LiveRequest> {
    return eventually(() => {
      const found = this.requests.find(isWanted);
      if (!found) throw new Error(`Not told so far:\n${this.text}`);
      return found;
    });
  }

  isComplete(): boolean {
    return this.response.complete;
  }

  leave(): void {
    this.response.destroy();
  }

  private events(name: string): unknown[] {
    const events = this.text.split('\n\n').slice(0, -1);
    return events
      .filter((event) => event.startsWith(`event: ${name}\n`))
      .map((event) => JSON.parse(event.slice(event.indexOf('data: ') + 6)));
  }
}

async function watching(use: (watcher: Watcher) => Promise<void>): Promise<void> {
  const watcher = await Watcher.of(http.url);
  try {
    await use(watcher);
  } finally {
    watcher.leave();
  }
}

const makeTransfer = (changes: object = {}) =>
  post(`${http.url}/transfers`, { id: randomUUID(), from: WORLD, to: ALICE, amount: 1, ...changes });

const isStored = async (id: string): Promise<boolean> => (await database.admin('transfers').where({ id })).length > 0;

const whoListens = (): string[] =>
  Object.entries(sessionChannels)
    .filter(([, channel]) => channel.hasSubscribers)
    .map(([name]) => name);

async function sleeping(): Promise<unknown[]> {
  const { rows } = await database.admin.raw(
    "select pid from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'",
  );
  return rows;
}
