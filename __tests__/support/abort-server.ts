import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { Client } from 'pg';

export interface ReachableServer {
  readonly url: URL;
  /** The folder of its Unix socket. */
  readonly socketFolder: string;
  /** The certificate that it shows, for `localhost` and 127.0.0.1; undefined if there is no openssl to make one. */
  readonly ca: string | undefined;
  stop(): Promise<void>;
}

/** A PostgreSQL of the file's own that can be reached in several ways: by TCP with and without TLS, and by a Unix socket. */
export function useReachableServer(): ReachableServer {
  let app: ChildProcess;
  const server = {
    url: undefined as unknown as URL,
    socketFolder: '',
    ca: undefined as string | undefined,
    async stop() {
      const exited = once(app, 'exit');
      app.kill('SIGTERM');
      await exited;
    },
  };
  const runs = process.env['TEST_DATABASE_URL'];
  beforeAll(async () => {
    // Relative to the data's folder. In a process of its own: Jest cannot load the launcher, an ES module, into its sandbox.
    const settings = { max_connections: 50, fsync: 'off', unix_socket_directories: '.', listen_addresses: '127.0.0.1,::1' };
    app = spawn(process.execPath, [resolve('__tests__/support/launch.mjs'), JSON.stringify({ settings })], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const [line] = (await once(createInterface({ input: app.stdout as NonNullable<ChildProcess['stdout']> }), 'line')) as [string];
    const told = JSON.parse(line);
    if (told.error) throw new Error(told.error);
    Object.assign(server, { url: new URL(told.url), socketFolder: told.dataDir });
    process.env['TEST_DATABASE_URL'] = told.url;
    const pair = makeCertificate();
    if (pair) await turnOnTls(told.url, pair);
    server.ca = pair?.cert;
  });
  afterAll(() => {
    process.env['TEST_DATABASE_URL'] = runs;
  });
  return server;
}

interface Pair {
  key: string;
  cert: string;
}

function makeCertificate(): Pair | undefined {
  const folder = mkdtempSync(join(tmpdir(), 'abort-tls-'));
  const [key, cert] = [join(folder, 'key.pem'), join(folder, 'cert.pem')];
  const request = 'req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost'.split(' ');
  try {
    execFileSync('openssl', [...request, '-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1', '-keyout', key, '-out', cert], {
      stdio: 'pipe',
    });
    return { key: readFileSync(key, 'utf8'), cert: readFileSync(cert, 'utf8') };
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** The server writes the files itself: they must belong to its account, which is not always ours. */
async function turnOnTls(url: string, { key, cert }: Pair): Promise<void> {
  const client = new Client({ connectionString: url });
  await client.connect();
  try {
    for (const [name, pem] of Object.entries({ 'server.key': key, 'server.crt': cert })) {
      await client.query(`COPY (SELECT unnest(string_to_array('${pem.trim()}', E'\\n'))) TO PROGRAM 'umask 077; cat > ${name}'`);
    }
    await client.query('ALTER SYSTEM SET ssl = on');
    await client.query('SELECT pg_reload_conf()');
  } finally {
    await client.end();
  }
}
