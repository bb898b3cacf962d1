import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { get, type IncomingMessage } from 'node:http';
import type { Knex } from 'knex';
import { createDatabase, type TestDatabase } from './database';
import { type Started, startExampleApp } from './example-app';
import { TransferLoad } from './example-app-load';
import { get as request } from './http';
import { eventually } from './pool';
import { startWireProxy, type WireProxy } from './wire-proxy';

export interface Hold {
  ids: string[];
  release(): Promise<void>;
}

/** The example app on a database of its own, with accounts to move money between. */
export class ExampleStage {
  /** Entries of the long account: its statement is more than all buffers on the way hold. */
  readonly entryCount = 3_000;
  private readonly releases: (() => Promise<void>)[] = [];

  private constructor(
    readonly app: Started,
    readonly url: string,
    readonly load: TransferLoad,
    /** Straight to the server, for what a test holds and looks at. */
    readonly admin: Knex,
    readonly proxy: WireProxy | undefined,
    private readonly database: TestDatabase,
    private readonly longAccount: string,
  ) {}

  static async open({ isBehindProxy = false } = {}): Promise<ExampleStage> {
    const database = await createDatabase();
    const admin = database.knex();
    const proxy = isBehindProxy ? await startWireProxy(database.url) : undefined;
    const app = startExampleApp({ DATABASE_URL: proxy?.url ?? database.url });
    const url = await app.url();
    const { rows } = await admin.raw(`
      insert into accounts (name, kind) select 'Test ' || n, case when n <= 2 then 'customer' else 'external' end
        from generate_series(1, 10) n returning id`);
    const [poor, long, ...external]: string[] = rows.map(({ id }: { id: string }) => id);
    const load = new TransferLoad(url, { external, poor: poor ?? '' });
    return new ExampleStage(app, url, load, admin, proxy, database, long ?? '');
  }

  async close(): Promise<void> {
    this.app.signal('SIGKILL');
    await this.app.exit;
    for (const release of this.releases) await release();
    await this.load.ended();
    await this.proxy?.close();
    await this.database.drop();
  }

  /** Resolves with the exit code when the app has ended. */
  async stop(signal: NodeJS.Signals): Promise<{ code: number | null; isInTime: boolean }> {
    const signalledAt = performance.now();
    this.app.signal(signal);
    const code = await this.app.exit;
    return { code, isInTime: performance.now() - signalledAt < DOCKERS_PATIENCE_MS };
  }

  /** How the app's sessions stand. */
  async sessions(): Promise<unknown> {
    return JSON.parse((await request(`${this.url}/health`)).body).sessions;
  }

  /** Transfers with these ids will wait in their first statement, until the hold is released: then their ids are free. */
  async holdIds(count: number): Promise<Hold> {
    const ids = Array.from({ length: count }, () => randomUUID());
    return this.hold(ids, (trx) => trx('transfers').insert(ids.map((id) => ({ id, memo: '' })) as never));
  }

  /** Transfers with this account will wait in COMMIT. */
  async holdAccount(): Promise<Hold> {
    const [account = ''] = await this.admin('accounts').where({ name: 'Test 3' }).pluck('id');
    return this.hold([account], (trx) => trx('accounts').where({ id: account }).forNoKeyUpdate());
  }

  async fillLongAccount(): Promise<void> {
    await this.admin.transaction(async (trx) => {
      await trx.raw('set local session_replication_role = replica'); // The triggers would take minutes.
      await trx.raw(
        `with new as (insert into transfers (id, memo) select gen_random_uuid(), repeat('x', 2000) from generate_series(1, ?) returning id)
        insert into entries (transfer_id, account_id, amount)
          select id, account::uuid, amount from new, (values (?, 1), (?, -1)) as sides (account, amount)`,
        [this.entryCount, this.longAccount, this.load.accounts.external[0] ?? ''],
      );
      await trx.raw('update accounts set balance = (select coalesce(sum(amount), 0) from entries where account_id = accounts.id)');
    });
  }

  /** A download of the long account's statement, of which nothing is read yet. */
  async download(): Promise<{ read(): Promise<string> }> {
    const [response] = (await once(get(`${this.url}/accounts/${this.longAccount}/statement.csv`, { agent: false }), 'response')) as [
      IncomingMessage,
    ];
    return {
      async read() {
        let text = '';
        for await (const chunk of response.setEncoding('utf8')) text += chunk;
        return text;
      },
    };
  }

  async backends(condition = 'true'): Promise<unknown[]> {
    const { rows } = await this.admin.raw(
      `select state, query from pg_stat_activity where datname = current_database() and application_name = 'ledger' and ${condition}`,
    );
    return rows;
  }

  async noBackends(): Promise<void> {
    await eventually(async () => expect(await this.backends()).toEqual([]));
  }

  private async hold(ids: string[], by: (trx: Knex.Transaction) => PromiseLike<unknown>): Promise<Hold> {
    const trx = await this.admin.transaction();
    await by(trx);
    const release = async () => {
      if (!trx.isCompleted()) await trx.rollback();
    };
    this.releases.push(release);
    return { ids, release };
  }
}

const DOCKERS_PATIENCE_MS = 10_000;
