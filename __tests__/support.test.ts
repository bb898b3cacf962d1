import { EventEmitter, once } from 'node:events';
import { connect } from 'node:net';
import { Client } from 'pg';
import { createDatabase, type TestDatabase } from './support/database';
import { listen, RawClient, rawRequest, request } from './support/http';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { MessageReader } from './support/wire-messages';
import { startWireProxy, type WireProxy } from './support/wire-proxy';

failOnWarnings();

describe('the wire proxy', () => {
  let database: TestDatabase;
  let proxy: WireProxy;
  let client: Client;
  let ended: Promise<unknown>;

  beforeAll(async () => {
    database = await createDatabase();
    await database.admin.raw('CREATE TABLE t (id int)');
  });
  afterAll(() => database.drop());

  beforeEach(async () => {
    await database.admin('t').del();
    proxy = await startWireProxy(database.url);
    client = new Client({ connectionString: proxy.url });
    client.on('error', () => {});
    ended = new Promise((resolve) => client.once('end', resolve));
    await client.connect();
  });
  afterEach(async () => {
    proxy.resume();
    proxy.onFrontend(undefined);
    await client.end();
    await proxy.close();
  });

  const openTransactions = () =>
    database.admin('pg_stat_activity').whereRaw("datname = current_database() AND state = 'idle in transaction'");

  it('records what a client sends after its start-up, and counts the round trips', async () => {
    expect(proxy.frontend).toEqual([]);
    expect(proxy.roundTrips()).toBe(0);
    await client.query('SELECT 1');
    await client.query('SELECT $1::int', [2]);
    expect(proxy.frontend.map(({ type }) => type).join('')).toBe('QPBDES');
    expect(proxy.sql()).toEqual(['SELECT 1', 'SELECT $1::int']);
    expect(proxy.roundTrips()).toBe(2);
    proxy.reset();
    expect(proxy.sql()).toEqual([]);
    expect(proxy.roundTrips()).toBe(0);
  });

  it('passes large messages in both directions unharmed', async () => {
    const large = 'äx'.repeat(2_000_000);
    const { rows } = await client.query('SELECT $1::text AS large', [large]);
    expect(rows[0].large === large).toBe(true);
    const { rows: many } = await client.query("SELECT i, repeat('y', 100) FROM generate_series(1, 50000) i");
    expect(many).toHaveLength(50_000);
  });

  it('refuses TLS, as a server without it', async () => {
    const secure = new Client({ connectionString: proxy.url, ssl: true });
    await expect(secure.connect()).rejects.toThrow('does not support SSL');
  });

  it('cuts before a message: the server never sees it', async () => {
    proxy.onFrontend(({ text }) => (text === 'COMMIT' ? 'cut-before' : undefined));
    await client.query('BEGIN');
    await client.query('INSERT INTO t VALUES (1)');
    await expect(client.query('COMMIT')).rejects.toThrow('Connection terminated unexpectedly');
    await ended;
    await eventually(async () => expect(await openTransactions()).toEqual([]));
    expect(await database.admin('t')).toEqual([]);
  });

  it.each([
    ['a Query', undefined],
    ['a Parse, with its group', []],
  ])('cuts after %s: the server acts on it, the client hears nothing', async (_, values) => {
    proxy.onFrontend(({ text }) => (text === 'COMMIT' ? 'cut-after' : undefined));
    await client.query('BEGIN');
    await client.query('INSERT INTO t VALUES (1)');
    const commit = values ? client.query({ text: 'COMMIT', values, name: 'commit' }) : client.query('COMMIT');
    await expect(commit).rejects.toThrow('Connection terminated unexpectedly');
    await eventually(async () => expect(await database.admin('t')).toEqual([{ id: 1 }]));
  });

  it('shows the answers, and cuts before one', async () => {
    const answers: string[] = [];
    proxy.onBackend(({ type, text }) => {
      answers.push(text ? `${type} ${text}` : type);
      return text === 'INSERT 0 1' ? 'cut-before' : undefined;
    });
    await expect(client.query('SELECT 1/0')).rejects.toThrow('division by zero');
    await expect(client.query('INSERT INTO t VALUES (1)')).rejects.toThrow('terminated');
    expect(answers).toEqual(['E 22012', 'Z I', 'C INSERT 0 1']);
  });

  it('holds a message as long as the promise of a hook, and what follows it', async () => {
    const held = new EventEmitter();
    proxy.onFrontend(async ({ text }) => {
      if (text !== 'SELECT 1') return;
      setImmediate(() => held.emit('seen'));
      await once(held, 'release');
    });
    let isAnswered = false;
    const answer = client.query('SELECT 1').then(() => {
      isAnswered = true;
    });
    await once(held, 'seen');
    await database.admin.raw('SELECT 1');
    expect(isAnswered).toBe(false);
    held.emit('release');
    await answer;
  });

  it('pauses like a dead network, new connections included', async () => {
    proxy.pause();
    const late = new Client({ connectionString: proxy.url });
    let count = 0;
    const answers = [client.query('SELECT 1'), late.connect()].map((answer) => answer.then(() => count++));
    await database.admin.raw('SELECT 1');
    expect(count).toBe(0);
    proxy.resume();
    await Promise.all(answers);
    await late.end();
  });

  it('cuts every connection, and lets new ones in', async () => {
    const interrupted = expect(client.query('SELECT pg_sleep(60)')).rejects.toThrow(/terminated|ECONNRESET/);
    proxy.cut();
    await interrupted;
    const next = new Client({ connectionString: proxy.url });
    await next.connect();
    await next.end();
    await eventually(() => expect(proxy.connections()).toBe(0));
  });

  it('forwards cancel requests', async () => {
    const sleeping = expect(client.query('SELECT pg_sleep(60)')).rejects.toThrow('user request');
    // As pg cancels: on a connection of its own, with the key that the server gave to the first one.
    const { processID, secretKey } = client as unknown as { processID: number; secretKey: number };
    const cancelRequest = Buffer.alloc(16);
    for (const [index, word] of [16, 80877102, processID, secretKey].entries()) cancelRequest.writeInt32BE(word, index * 4);
    let isCancelled = false;
    sleeping.then(
      () => {
        isCancelled = true;
      },
      () => {},
    );
    // One that comes before the server has begun the statement has no effect.
    await eventually(() => {
      connect(Number(new URL(proxy.url).port), '127.0.0.1').end(cancelRequest);
      expect(isCancelled).toBe(true);
    });
    await sleeping;
    expect(proxy.frontend.map(({ type }) => type)).toContain('CancelRequest');
  });
});

describe('the message reader', () => {
  const query = Buffer.from('Q\0\0\0\x0dSELECT 1\0');
  const startUp = Buffer.from([0, 0, 0, 8, 0, 3, 0, 0]);

  it('finds the same messages wherever TCP splits the bytes', () => {
    const stream = Buffer.concat([startUp, query, query]);
    for (let split = 0; split <= stream.length; split++) {
      const reader = new MessageReader('frontend', 1);
      const messages = [...reader.read(stream.subarray(0, split)), ...reader.read(stream.subarray(split))];
      expect(messages.map(({ type, text }) => type + text)).toEqual(['Startup', 'QSELECT 1', 'QSELECT 1']);
    }
  });
});

describe('the HTTP helpers', () => {
  it('tell a whole response from one that was cut off', async () => {
    const app = await listen((req, res) => {
      res.writeHead(200, { 'Content-Length': 10 });
      res.write('12345');
      if (req.url === '/whole') res.end('67890');
      else setImmediate(() => req.socket.resetAndDestroy());
    });
    expect(await request(`${app.url}/whole`)).toMatchObject({ status: 200, body: '1234567890', complete: true });
    const broken = await request(`${app.url}/broken`);
    expect(broken).toMatchObject({ status: 200, body: '12345', complete: false });
    expect(broken.error?.code).toBe('ECONNRESET');
    await app.close();
    expect((await request(app.url)).error?.code).toBe('ECONNREFUSED');
  });

  it('close sockets that are still open', async () => {
    const app = await listen(() => {});
    const client = await RawClient.connect(app.port);
    client.get('/hangs');
    await once(app.server, 'request');
    await app.close();
    await client.closed;
    await expect(client.readUntil('never')).rejects.toThrow('ended before never');
  });

  it('speak raw bytes', async () => {
    const app = await listen((req, res) => res.end(req.url));
    expect(await rawRequest(app.port, 'GET /a HTTP/1.0\r\n\r\n')).toMatch(/^HTTP\/1.1 200 OK\r\n.*\r\n\r\n\/a$/s);
    const client = await RawClient.connect(app.port);
    await client.get('/b').readUntil('\r\n\r\n/b');
    await client.get('/c').readUntil((received) => received.endsWith('/c'));
    await client.reset();
    await app.close();
  });
});

describe('a test database', () => {
  it('is not dropped in silence when a pool still has a connection in use', async () => {
    const database = await createDatabase();
    const pool = database.knex();
    await pool.transaction();
    expect(poolUsage(pool)).toEqual({ used: 1, free: 0, pendingAcquires: 0 });
    await expect(database.drop()).rejects.toThrow('still has connections in use');
  });
});
