import type { Transform } from 'node:stream';
import type { Knex } from 'knex';
import { type Beginning, settingsCommand } from './beginning';
import { cancelUntilReady } from './cancel-request';
import { type Connection, type KnexClient, unlessNothing } from './connection';
import { SessionClosedError, SessionError, TransactionAbortedError } from './errors';
import { isReady, type PgConnection, type Statement } from './postgres';
import { isLease, type Lease } from './statement-queue';

/**
 * A session inside someone else's `Knex.Transaction`: a savepoint in it, which Knex opens and ends, one after the other.
 * Its commit is a RELEASE: the work is stored when the outer transaction commits.
 */
export class OuterTransaction implements Connection {
  readonly hasBegun = true;
  readonly lostBecause = undefined;
  /** Whose statement runs, and so whose listeners hear of it. */
  private current: KnexClient | undefined;
  /** What a statement of ours runs on now. */
  private running: { connection: PgConnection | Lease; end: Promise<void> } | undefined;
  private readonly settingsBefore: [name: string, value: string][] = [];
  private cancelling: Promise<void> | undefined;
  private giveUp!: () => void;
  /** Resolves when the session has no business with the connection any more, dead or not. */
  private readonly givenUp = new Promise<void>((resolve) => {
    this.giveUp = resolve;
  });

  private constructor(
    private readonly savepoint: Knex.Transaction,
    readonly knexUid: string | undefined,
    private readonly client: KnexClient,
    private readonly streamOption: unknown,
  ) {
    this.current = client;
    for (const event of ['query', 'query-error']) {
      savepoint.client.on(event, (...values: unknown[]) => this.current?.emit(event, ...values));
    }
  }

  static async join(
    outer: Knex.Transaction,
    client: KnexClient,
    streamOption: unknown,
    { modes, settings }: Beginning,
  ): Promise<OuterTransaction> {
    if (modes.isolationLevel !== undefined || modes.readOnly !== undefined || modes.deferrable !== undefined) {
      throw new SessionError('ERR_SESSION_OPTIONS', MODES_OF_ANOTHER);
    }
    if (outer.isCompleted()) throw new SessionClosedError('the transaction that was given in place of Knex has ended.');
    const savepoint = await outer.transaction();
    // Knex hands a transaction out even if its SAVEPOINT has failed; this promise tells.
    if (savepoint.isCompleted()) await savepoint.executionPromise;
    const connection = await savepoint.client.acquireConnection();
    const joined = new OuterTransaction(savepoint, connection.__knexUid, client, streamOption);
    savepoint.client.releaseConnection(connection);
    try {
      await joined.set(settings);
    } catch (error) {
      await savepoint.rollback();
      throw error;
    }
    return joined;
  }

  /** Settings outlive RELEASE: they are put back before it. */
  private async set(settings: readonly [name: string, value: string][]): Promise<void> {
    await this.beforeSet(settings);
    await this.apply(settings);
  }

  async beforeSet(settings: readonly [name: string, value: string][]): Promise<void> {
    for (const [name] of settings) {
      if (this.settingsBefore.some(([known]) => known === name)) continue;
      const { rows } = await this.savepoint.raw('SELECT current_setting(?, true) AS value', [name]);
      this.settingsBefore.push([name, rows[0].value ?? '']);
    }
  }

  private async apply(settings: readonly [name: string, value: string][]): Promise<void> {
    if (settings.length === 0) return;
    const { text, values = [] } = settingsCommand(settings);
    await this.savepoint.raw(text.replace(/\$\d+/g, '?'), [...values]);
  }

  query(client: KnexClient, statement: Statement): Promise<unknown> {
    return this.run(client, (connection) => this.savepoint.client.query(connection, statement));
  }

  stream(client: KnexClient, statement: Statement, _txid: string, stream: Transform, options: unknown): Promise<unknown> {
    return this.run(client, (connection) => this.savepoint.client.stream(connection, statement, stream, options).catch(unlessNothing));
  }

  /** Takes the outer connection for one statement only: if the outer transaction is a session, others wait for their turn. */
  private async run(client: KnexClient, send: (connection: PgConnection | Lease) => Promise<unknown>): Promise<unknown> {
    const connection = await this.savepoint.client.acquireConnection();
    this.current = client;
    // A plain Knex.Transaction has no turns: behind a statement of others ours waits in pg's queue, and a cancel would hit theirs.
    const isNext = isLease(connection) || isReady(connection);
    try {
      const sent = send(connection);
      if (isNext) this.running = { connection, end: sent.then(noop, noop) };
      return await sent;
    } finally {
      // RELEASE and ROLLBACK TO are the session's own.
      this.current = this.client;
      this.running = undefined;
      this.savepoint.client.releaseConnection(connection);
    }
  }

  readonly takesMore = false;

  whenReady(): Promise<boolean> | true {
    return this.cancelling?.then(() => true) ?? true;
  }

  hasEndedByItself(): boolean {
    return false;
  }

  async commit(abortedBy: unknown): Promise<void> {
    if (abortedBy !== undefined) {
      // RELEASE would fail, and leave the outer transaction aborted.
      await this.rollback();
      throw new TransactionAbortedError(abortedBy);
    }
    await this.apply(this.settingsBefore.reverse());
    await this.savepoint.commit();
    // Knex's commit() resolves even if it failed; this promise tells.
    await this.savepoint.executionPromise;
  }

  async rollback(): Promise<void> {
    await this.savepoint.rollback();
  }

  release(): void {
    this.giveUp();
    // A statement that Knex has given up still runs: ROLLBACK TO waits behind it, and the next savepoint behind that.
    if (!this.savepoint.isCompleted()) this.rollback().catch(() => {});
  }

  cancel(): Promise<void> {
    this.cancelling ??= this.cancelRunning().then(() => {
      this.cancelling = undefined;
    });
    return this.cancelling;
  }

  private async cancelRunning(): Promise<void> {
    const { running } = this;
    if (running === undefined) return;
    const { connection, end } = running;
    if (!isLease(connection)) await cancelUntilReady(connection, this.streamOption, Promise.race([end, this.givenUp]));
    else if (connection.isRunning) await connection.connection.cancel();
  }

  /** The connection is not ours: its owner goes on to use it, when it can be used. */
  destroy(): void {
    this.giveUp();
  }
}

const MODES_OF_ANOTHER =
  '`isolationLevel`, `readOnly` and `deferrable` are those of the transaction that was given in place of Knex, and cannot be changed inside of it.';

function noop(): void {}
