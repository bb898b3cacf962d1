import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { Knex } from 'knex';
import { Client } from 'pg';
import type { PgBouncer } from '../../tools/pgbouncer.mjs';
import { createDatabase, type TestDatabase } from './database';
import { startWireProxy, type WireProxy } from './wire-proxy';

const isInstalled = process.env['TEST_PGBOUNCER_PROGRAM'] !== undefined;

/** A `describe` whose tests are skipped, and say why, where there is no PgBouncer. */
export const describeBehindPgBouncer = (name: string, tests: () => void): void =>
  isInstalled ? describe(name, tests) : describe.skip(`${name} (skipped: PgBouncer is not installed)`, tests);

export interface Pooler extends PgBouncer {
  /** What it has logged, line by line. */
  readonly lines: readonly string[];
  isAlive(): boolean;
  /** Kills the process that has started it. */
  killParent(): Promise<void>;
}

export async function startPooler(settings: Record<string, string | number> = {}): Promise<Pooler> {
  const options = { databaseUrl: process.env['TEST_DATABASE_URL'], settings };
  const child = spawn(process.execPath, [join(__dirname, 'launch-pgbouncer.mjs'), JSON.stringify(options)]);
  const exited = once(child, 'exit');
  const lines: string[] = [];
  createInterface({ input: child.stderr }).on('line', (line) => lines.push(line));
  const { value } = await createInterface({ input: child.stdout })[Symbol.asyncIterator]().next();
  if (value === undefined) throw new Error(`PgBouncer did not start:\n${lines.join('\n')}`);
  const told: PgBouncer = JSON.parse(value);
  return {
    ...told,
    lines,
    isAlive() {
      try {
        return process.kill(told.pid, 0);
      } catch {
        return false;
      }
    },
    async killParent() {
      child.kill('SIGKILL');
      await exited;
    },
    async stop() {
      child.stdin.end();
      await exited;
    },
  };
}

/** A database behind a PgBouncer of its own, with a table `notes` that refuses an id twice at once, and 'refused' at COMMIT. */
export interface PooledDatabase {
  readonly database: TestDatabase;
  readonly pooler: Pooler;
  /** Between the app and PgBouncer. */
  readonly proxy: WireProxy;
  /** A pool whose connections go through the proxy and PgBouncer. */
  readonly knex: Knex;
  /** The URL of the database through PgBouncer. */
  url: string;
  stored(): Promise<string[]>;
  /** The server's processes that work for PgBouncer, but those that wait for it. */
  busyBackends(): Promise<unknown[]>;
  /** How PgBouncer uses its connections. */
  pools(): Promise<{ cl_waiting: number; sv_active: number }[]>;
}

export function usePooledDatabase(settings: Record<string, string | number> = {}, poolSize = 4): PooledDatabase {
  const used = {} as { -readonly [Key in keyof PooledDatabase]: PooledDatabase[Key] };
  beforeAll(async () => {
    used.database = await createDatabase();
    await used.database.admin.raw(`
      CREATE TABLE notes (id text PRIMARY KEY);
      CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'refused' USING ERRCODE = '23514'; END $$;
      CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON notes DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW WHEN (NEW.id = 'refused') EXECUTE FUNCTION refuse()`);
    used.pooler = await startPooler(settings);
    const url = new URL(used.pooler.url);
    url.pathname = new URL(used.database.url).pathname;
    used.url = url.href;
    used.proxy = await startWireProxy(used.url);
    used.knex = used.database.knex({ connection: used.proxy.url, pool: { min: 0, max: poolSize }, log: { warn() {}, error() {} } });
  });
  afterEach(() => used.database.admin('notes').del());
  afterAll(async () => {
    await used.database?.drop();
    await used.proxy?.close();
    await used.pooler?.stop();
  });
  used.stored = () => used.database.admin('notes').orderBy('id').pluck('id');
  used.busyBackends = () =>
    used.database
      .admin('pg_stat_activity')
      .whereRaw("datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND state <> 'idle'")
      .select('pid', 'state', 'query');
  used.pools = async () => {
    const console = new Client({ connectionString: used.pooler.adminUrl });
    await console.connect();
    const { rows } = await console.query('SHOW POOLS');
    await console.end();
    return rows;
  };
  return used;
}
