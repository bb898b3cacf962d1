import { once } from 'node:events';
import { chmod, mkdtemp, rm } from 'node:fs/promises';
import { createServer, get, type IncomingMessage } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { ALICE, BOB } from '../example-app/seed';
import { createDatabase, type TestDatabase } from './support/database';
import { killExampleApps, type Started, startExampleApp } from './support/example-app';
import { eventually } from './support/pool';

let database: TestDatabase;

beforeAll(async () => {
  database = await createDatabase();
});

afterEach(killExampleApps);

afterAll(() => database.drop());

describe('when npm start is run with a DATABASE_URL', () => {
  it('says what to try, and it works as said', async () => {
    const app = start();
    const text = await app.says('Ctrl-C stops it.');

    const [move, moveTooMuch, statement, ...others] = text.match(/curl .*/g) ?? [];
    expect(others).toEqual([]);
    await expect(curl(move)).resolves.toMatchObject({ status: 201 });
    await expect(curl(move)).resolves.toMatchObject({ status: 200 });
    await expect(curl(moveTooMuch)).resolves.toMatchObject({ status: 409 });
    await expect(curl(statement)).resolves.toMatchObject({ status: 200, text: expect.stringMatching(/(.*\n){4}/) });
    expect(await database.admin('accounts').where('id', BOB).pluck('balance')).toEqual(['4250']);
  });

  it.each(['SIGTERM', 'SIGINT', 'SIGHUP'] as const)('ends with code 0 and leaves no connection at %s', async (signal) => {
    const app = start();
    const url = await app.url();
    await (await fetch(`${url}/accounts/${ALICE}`)).json(); // Leaves a kept-alive connection, which must not hold up the end.
    const [events] = (await once(get(`${url}/live/events`), 'response')) as [IncomingMessage]; // Of an open page.
    const end = once(events.resume(), 'end'); // Rejects if it is cut.

    app.signal(signal);

    await end;
    expect(await app.exit).toBe(0);
    await eventually(async () => expect(await ledgerConnections()).toEqual([]));
  });

  it('finds its data again, and does not seed twice', async () => {
    const app = start();
    await app.url();
    expect(await database.admin('accounts').pluck('id')).toHaveLength(3);
  });
});

describe('when it is stopped while a request is in flight', () => {
  it('finishes the request first, and accepts no new one', async () => {
    const app = start();
    const url = await app.url();
    const lock = await lockAccount(ALICE);
    const answer = transfer(url);
    await eventually(async () => expect(await waitingCommits()).toHaveLength(1));

    app.signal('SIGTERM');
    await app.says('Finishing the requests in flight');
    await expect(fetch(`${url}/health`)).rejects.toThrow();
    await lock.rollback();

    expect((await answer).status).toBe(201);
    expect(await app.exit).toBe(0);
  });

  it('counts one Ctrl-C once, which npm start hears twice', async () => {
    const app = start();
    const url = await app.url();
    const lock = await lockAccount(ALICE);
    const answer = transfer(url);
    await eventually(async () => expect(await waitingCommits()).toHaveLength(1));

    app.signal('SIGINT');
    await app.says('Finishing the requests in flight');
    app.signal('SIGINT');
    await delay(200); // Its second signal says nothing.
    await lock.rollback();

    expect((await answer).status).toBe(201);
    expect(await app.exit).toBe(0);
  });

  it('stops at once at the second Ctrl-C', async () => {
    const app = start();
    const url = await app.url();
    const lock = await lockAccount(ALICE);
    const answer = transfer(url).then(
      () => 'answered',
      () => 'cut',
    );
    await eventually(async () => expect(await waitingCommits()).toHaveLength(1));

    app.signal('SIGINT');
    await app.says('Finishing the requests in flight');
    await delay(600); // Sooner, it is the same press: see server.ts.
    app.signal('SIGINT');

    expect(await app.exit).toBe(130);
    expect(await answer).toBe('cut');
    await lock.rollback();
  });
});

describe('when the shell that npm runs it in is gone', () => {
  it('stops, as npm was told to', async () => {
    const app = start({ npm_lifecycle_event: 'start' }, ['sh', '-c', `'${process.execPath}' --import tsx example-app/server.ts; true`]);
    await app.url();

    app.signal('SIGTERM'); // Only the shell gets it.

    await app.says('Finishing the requests in flight');
    await app.exit;
    await eventually(async () => expect(await ledgerConnections()).toEqual([]));
  });
});

describe('when npm start is run without a DATABASE_URL', () => {
  it('starts its own PostgreSQL, and a second start finds the data again', async () => {
    const dataDir = await mkdtemp(join(tmpdir(), 'ledger-'));
    await chmod(dataDir, 0o755); // As root, another user runs the server.
    const env = { DATABASE_URL: '', DATA_DIR: join(dataDir, 'data') };
    try {
      const first = start(env);
      expect((await transfer(await first.url())).status).toBe(201);
      first.signal('SIGTERM');
      expect(await first.exit).toBe(0);

      const second = start(env);
      const bob: unknown = await (await fetch(`${await second.url()}/accounts/${BOB}`)).json();
      second.signal('SIGINT');
      expect(await second.exit).toBe(0);

      expect(bob).toMatchObject({ balance: '4250' });
    } finally {
      await rm(dataDir, { recursive: true, force: true });
    }
  }, 60_000);
});

describe('when it cannot start', () => {
  it.each([
    ['a PORT that is no number', { PORT: 'http' }, "Expected PORT to be a whole number from 0 to 65535, got 'http'."],
    ['a PORT that is too high', { PORT: '70000' }, "Expected PORT to be a whole number from 0 to 65535, got '70000'."],
    ['a DATABASE_URL that is none', { DATABASE_URL: 'localhost' }, 'Expected DATABASE_URL to be like postgres://'],
    [
      'a database that is down',
      { DATABASE_URL: 'postgres://me:secret@127.0.0.1:1/db' },
      'Cannot connect to the database: connect ECONNREFUSED 127.0.0.1:1.',
    ],
    ['a host that does not exist', { DATABASE_URL: 'postgres://me:secret@host.invalid/db' }, 'Cannot connect to the database: getaddrinfo'],
  ])('says why in one line, and exits with code 1: %s', async (_name, env, message) => {
    const app = start(env);

    expect(await app.exit).toBe(1);

    expect(app.output()).toContain(message);
    expect(app.output().trimEnd().split('\n')).toHaveLength(1);
    expect(app.output()).not.toContain('secret');
  });

  it('names a port that is in use, and leaves no connection', async () => {
    const other = createServer().listen(0);
    const { port } = other.address() as AddressInfo;

    const app = start({ PORT: String(port) });

    expect(await app.exit).toBe(1);
    expect(app.output()).toBe(`Cannot listen on port ${port} (EADDRINUSE). Choose another, for example: PORT=${port + 1} npm start\n`);
    await eventually(async () => expect(await ledgerConnections()).toEqual([]));
    other.close();
  });
});

const start = (env: NodeJS.ProcessEnv = {}, command?: [string, ...string[]]): Started =>
  startExampleApp({ DATABASE_URL: database.url, ...env }, command);

/** Does what a printed curl line does; curl itself may be missing. */
async function curl(line = ''): Promise<{ status: number; text: string }> {
  const [url = ''] = line.match(/http:\S+/) ?? [];
  const [, body] = line.match(/-d '([^']*)'/) ?? [];
  const [, type = ''] = line.match(/-H 'content-type: ([^']*)'/) ?? [];
  const response = await fetch(url, body === undefined ? {} : { method: 'POST', body, headers: { 'content-type': type } });
  return { status: response.status, text: await response.text() };
}

function transfer(url: string): Promise<Response> {
  return fetch(`${url}/transfers`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ id: crypto.randomUUID(), from: ALICE, to: BOB, amount: 500 }),
  });
}

async function lockAccount(id: string) {
  const lock = await database.admin.transaction();
  await lock('accounts').where({ id }).forNoKeyUpdate();
  return lock;
}

const waitingCommits = async () => activity("wait_event_type = 'Lock' and query ilike 'commit%'");
const ledgerConnections = async () => activity("application_name = 'ledger'");

async function activity(condition: string): Promise<unknown[]> {
  const { rows } = await database.admin.raw(
    `select pid, state, query from pg_stat_activity where datname = current_database() and ${condition}`,
  );
  return rows;
}
