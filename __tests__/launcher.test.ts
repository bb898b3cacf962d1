import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { chmod, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { type AddressInfo, connect, createServer } from 'node:net';
import { networkInterfaces, tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import { Client } from 'pg';
import type { Postgres, PostgresOptions } from '../tools/postgres.mjs';
import { eventually } from './support/pool';

type Told = Postgres & { error: string; stopped: string; alive: number };
type StartedApp = App & { server: Told };

const apps: StartedApp[] = [];
let folder: string;
/** One for all who need a server only: making a new cluster takes a second. */
let dataDir: string;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'launcher-test-'));
  // Root's server runs as somebody else, who must be able to enter.
  await chmod(folder, 0o755);
  dataDir = join(folder, 'kept', 'database');
});
afterEach(async () => {
  for (const app of apps.splice(0)) {
    await app.kill('SIGKILL');
    // Its supervisor stops the server on its own, and must be done before the folders are removed.
    const { pid } = app.server;
    if (pid) await eventually(() => expect(isAlive(pid)).toBe(false), 10_000);
  }
});
afterAll(() => rm(folder, { recursive: true, force: true }));

/** An app in a process of its own. */
class App {
  private readonly lines: AsyncIterator<string>;
  private readonly exited: Promise<unknown>;

  static async start(options: PostgresOptions = {}): Promise<StartedApp> {
    const child = spawn(process.execPath, [join(__dirname, 'support', 'launch.mjs'), JSON.stringify(options)], {
      // A process group of its own, as a terminal would give it.
      detached: true,
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const app = new App(child);
    const started = Object.assign(app, { server: await app.told() });
    apps.push(started);
    return started;
  }

  private constructor(private readonly child: ChildProcess) {
    const { stdout } = child;
    if (!stdout) throw new Error('no stdout');
    this.lines = createInterface({ input: stdout })[Symbol.asyncIterator]();
    this.exited = once(child, 'exit');
  }

  async told(): Promise<Told> {
    return JSON.parse((await this.lines.next()).value);
  }

  signal(signal: NodeJS.Signals): void {
    this.child.kill(signal);
  }

  /** As Ctrl-C does: the signal goes to the whole process group. */
  async kill(signal: NodeJS.Signals): Promise<void> {
    if (this.child.pid && isAlive(this.child.pid)) process.kill(-this.child.pid, signal);
    await this.exited;
  }
}

async function query(server: Postgres, sql: string): Promise<unknown[]> {
  const client = new Client({ connectionString: server.url });
  await client.connect();
  const { rows } = await client.query(sql);
  await client.end();
  return rows;
}

function isAlive(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch {
    return false;
  }
}

const connects = (port: number, host: string) =>
  new Promise<boolean>((resolve) => {
    const socket = connect({ port, host }, () => resolve(true)).on('error', () => resolve(false));
    socket.once('connect', () => socket.destroy());
  });

describe('without a data folder', () => {
  it('keeps everything in a temporary one, and leaves nothing behind after Ctrl-C', async () => {
    const app = await App.start({ settings: { max_connections: 37 } });
    expect(await query(app.server, 'SHOW max_connections')).toEqual([{ max_connections: '37' }]);
    await app.kill('SIGINT');
    // The app's own shutdown came first, and still had its database.
    expect(await app.told()).toEqual({ stopped: 'SIGINT', alive: 1 });
    expect(isAlive(app.server.pid)).toBe(false);
    expect(existsSync(dirname(app.server.dataDir))).toBe(false);
  });

  it('leaves nothing behind when the app is killed', async () => {
    const app = await App.start();
    const { server } = app;
    await app.kill('SIGKILL');
    await eventually(() => expect(isAlive(server.pid)).toBe(false), 10_000);
    await eventually(() => expect(existsSync(dirname(server.dataDir))).toBe(false), 10_000);
  });
});

describe('when it is restarted', () => {
  const ways = [
    { mode: 'immediate', signal: 'SIGUSR2', told: 'Connection terminated unexpectedly' },
    { mode: 'fast', signal: 'SIGUSR1', told: 'terminating connection due to administrator command' },
  ] as const;

  it.each(ways)('comes back ($mode) with the same address, data and settings', async ({ signal, told }) => {
    const app = await App.start({ settings: { max_connections: 37 } });
    const client = new Client({ connectionString: app.server.url });
    const lost = new Promise<Error>((resolve) => client.on('error', resolve));
    await client.connect();
    await client.query('CREATE TABLE kept (id int)');
    app.signal(signal);
    const restarted = await app.told();
    expect((await lost).message).toBe(told);
    expect(restarted.error).toBeUndefined();
    expect(restarted.url).toBe(app.server.url);
    expect(restarted.pid).not.toBe(app.server.pid);
    expect(isAlive(app.server.pid)).toBe(false);
    expect(await query(restarted, 'SELECT * FROM kept')).toEqual([]);
    expect(await query(restarted, 'SHOW max_connections')).toEqual([{ max_connections: '37' }]);

    await app.kill('SIGINT');
    expect(isAlive(restarted.pid)).toBe(false);
    expect(existsSync(dirname(restarted.dataDir))).toBe(false);
  });

  it('takes several restarts in a row', async () => {
    const app = await App.start({ dataDir });
    for (let round = 0; round < 3; round++) {
      app.signal('SIGUSR2');
      expect(await query(await app.told(), 'SELECT 1 AS alive')).toEqual([{ alive: 1 }]);
    }
  });

  it('says so when there is no server to restart', async () => {
    const app = await App.start({ dataDir });
    process.kill(app.server.pid, 'SIGKILL');
    await eventually(() => expect(isAlive(app.server.pid)).toBe(false));
    app.signal('SIGUSR2');
    expect((await app.told()).error).toContain('PostgreSQL did not restart: its supervisor died');
  });
});

describe('with a data folder', () => {
  it('listens on the loopback interface only', async () => {
    const { server } = await App.start({ dataDir });
    expect(await connects(server.port, '127.0.0.1')).toBe(true);
    const others = Object.values(networkInterfaces()).flatMap((addresses) => addresses ?? []);
    for (const { address, internal } of others) {
      if (!internal) expect(await connects(server.port, address)).toBe(false);
    }
  });

  it('says so when the port is taken', async () => {
    const other = createServer().listen(0, '127.0.0.1');
    await once(other, 'listening');
    const { port } = other.address() as AddressInfo;
    const app = await App.start({ dataDir, port });
    expect(app.server.error).toContain(`port ${port} on 127.0.0.1 is taken`);
    other.close();
  });

  it('finds its data at the second start', async () => {
    const first = await App.start({ dataDir });
    await query(first.server, 'CREATE TABLE kept (id int)');
    await first.kill('SIGTERM');
    expect(isAlive(first.server.pid)).toBe(false);

    const second = await App.start({ dataDir });
    expect(await query(second.server, 'SELECT * FROM kept')).toEqual([]);
    expect(second.server.url.split('@')[0]).toBe(first.server.url.split('@')[0]);
  });

  it('finds its data right after the app was killed', async () => {
    const first = await App.start({ dataDir });
    await query(first.server, 'CREATE TABLE kept_by_app (id int)');
    await first.kill('SIGKILL');
    const second = await App.start({ dataDir });
    expect(await query(second.server, 'SELECT * FROM kept_by_app')).toEqual([]);
  });

  it('finds its data after the server itself was killed', async () => {
    const first = await App.start({ dataDir });
    await query(first.server, 'CREATE TABLE kept_by_server (id int)');
    process.kill(first.server.pid, 'SIGKILL');
    await eventually(() => expect(isAlive(first.server.pid)).toBe(false));
    expect(existsSync(join(first.server.dataDir, 'postmaster.pid'))).toBe(true);
    const second = await App.start({ dataDir });
    expect(await query(second.server, 'SELECT * FROM kept_by_server')).toEqual([]);
  });

  it('does not mistake another process with the dead server’s id for it', async () => {
    const first = await App.start({ dataDir });
    const lock = join(first.server.dataDir, 'postmaster.pid');
    const content = await readFile(lock, 'utf8');
    await first.kill('SIGTERM');
    await writeFile(lock, content.replace(/^\d+/, String(process.pid)));
    const second = await App.start({ dataDir });
    expect(second.server.error).toBeUndefined();
  });

  it('refuses a folder that a running server uses, and says what to do', async () => {
    const first = await App.start({ dataDir });
    const second = await App.start({ dataDir });
    expect(second.server.error).toContain(`another PostgreSQL (process ${first.server.pid}, port ${first.server.port}) uses`);
    expect(second.server.error).toContain('Stop what started it');
    expect(isAlive(first.server.pid)).toBe(true);
  });

  it('refuses a folder with something else in it', async () => {
    await writeFile(join(folder, 'precious'), 'x');
    const app = await App.start({ dataDir: folder });
    expect(app.server.error).toContain('holds something that is no PostgreSQL database');
    expect(existsSync(join(folder, 'precious'))).toBe(true);
  });

  const asRoot = process.getuid?.() === 0 ? it : it.skip;
  asRoot('keeps the data elsewhere, and says where, when root’s server cannot enter the folder', async () => {
    await mkdir(join(folder, 'closed'), { mode: 0o700 });
    const options = { dataDir: join(folder, 'closed', 'database') };
    const first = await App.start(options);
    try {
      await query(first.server, 'CREATE TABLE kept (id int)');
      expect(first.server.notice).toContain(dirname(first.server.dataDir));
      expect(first.server.dataDir.startsWith(folder)).toBe(false);
      await first.kill('SIGTERM');
      const second = await App.start(options);
      expect(await query(second.server, 'SELECT * FROM kept')).toEqual([]);
      await second.kill('SIGTERM');
    } finally {
      await rm(dirname(first.server.dataDir), { recursive: true, force: true });
    }
  });
});
