import { EventEmitter } from 'node:events';
import { performance } from 'node:perf_hooks';
import { cancelUntilReady } from '../cancel-request';
import { SessionError } from '../errors';
import { type PgConnection, type QueryCallback, transactionStatus, type Wire, whenReady } from '../postgres';
import { type Job, type QueryConfig, queryJob, type Submittable, submittableJob, toldOnce } from './job';
import type { TestRequest } from './requests';
import { beginSql, commitSql, rollbackSql } from './simulated-commit';
import type { Test, TestTransactions, Unit } from './test-transactions';
import { type Control, controlOf, localSettingsIn, type TransactionModes } from './transaction-control';

let units = 0;

/**
 * What Knex, and all that is built on it, takes for a connection of pg's: each has transactions of its own, as far as anybody can tell.
 * Beneath there is one connection for all, and a transaction on this one is a savepoint there. A statement outside of a transaction
 * is one by itself.
 */
export class TestConnection extends EventEmitter implements Unit {
  __knex__disposed: unknown;
  __knexUid: string | undefined;
  /** When its last statement ended, as `performance.now()` tells the time. */
  movedAt = 0;
  request: TestRequest | undefined;

  private readonly queue: Job[] = [];
  private current: Job | undefined;
  private whenDone: Promise<void> | undefined;
  /** Where the server is at work for it, and until when. */
  private sendingOn: PgConnection | undefined;
  private whenAnswered: Promise<void> | undefined;
  /** Whether it waits for someone who reads its rows. */
  private isPaused = false;
  private cancelling: Promise<void> | undefined;
  private lostBecause: (() => Error) | undefined;
  private transaction: { test: Test; savepoint: string; settings: Map<string, string> } | undefined;

  constructor(private readonly transactions: TestTransactions) {
    super();
    // Without a listener, an error would end the process.
    this.on('error', () => {});
  }

  // What pg's client has.

  query(config: string | QueryConfig | Submittable, values?: unknown, callback?: QueryCallback): unknown {
    const given = typeof config === 'string' ? { text: config } : config;
    const called = ((typeof values === 'function' ? values : callback) as QueryCallback | undefined) ?? given.callback;
    if ('submit' in given) {
      if (called) given.callback = called;
      const onPause = (isPaused: boolean): void => {
        this.isPaused = isPaused;
        this.movedAt = performance.now();
      };
      this.add(submittableJob(given, () => this.real?.connection, onPause));
      return given;
    }
    // `text` may be a getter of its class.
    const { callback: _, ...rest } = given;
    const statement = { ...rest, text: given.text, values: Array.isArray(values) ? values : given.values };
    if (called === undefined) return new Promise((resolve, reject) => this.add({ ...queryJob(statement), resolve, reject }));
    this.add({ ...queryJob(statement), resolve: (result) => called(null, result as never), reject: (error) => called(error) });
    return undefined;
  }

  get readyForQuery(): boolean {
    return this.current === undefined;
  }

  getTransactionStatus(): string {
    return this.transaction && this.real ? (transactionStatus(this.real) ?? 'T') : 'I';
  }

  end(callback?: () => void): Promise<void> {
    this.lose();
    if (callback) process.nextTick(callback);
    return Promise.resolve();
  }

  // The way in for a cancel, as long as it is this one's statement that it would hit.

  get processID() {
    return this.sendingOn?.processID;
  }
  get secretKey() {
    return this.sendingOn?.secretKey;
  }
  get host(): string {
    return this.sendingOn?.host ?? '';
  }
  get port(): number {
    return this.sendingOn?.port ?? 0;
  }
  get ssl(): unknown {
    return this.sendingOn?.ssl;
  }
  get sslNegotiation(): string | undefined {
    return this.sendingOn?.sslNegotiation;
  }
  get connection(): Wire | undefined {
    const wire = (this.sendingOn ?? this.real)?.connection;
    const stream = { remoteAddress: wire?.stream.remoteAddress, destroy: () => void this.end() };
    return wire && Object.create(wire, { stream: { value: stream } });
  }

  // What the tests' transaction asks.

  get isIdle(): boolean {
    return this.current === undefined || this.isPaused;
  }

  /**
   * As when a connection ends: whatever runs or waits on it fails, and its transaction is rolled back.
   *
   * @param reason if it is not the application that has ended it; makes one for each who is told
   */
  lose(reason?: () => Error): void {
    if (this.lostBecause) return;
    const error = reason ?? (() => new Error('Connection terminated'));
    this.lostBecause = error;
    this.transactions.leave(this, error());
    this.current?.reject(error());
    for (const job of this.queue.splice(0)) job.reject(error());
    void this.cancel();
    void this.next();
    process.nextTick(() => {
      if (reason) this.emit('error', reason());
      this.emit('end');
    });
  }

  /** Cancels the statement that runs; what comes next on the connection beneath waits until no cancel can hit it any more. */
  cancel(): Promise<void> {
    if (!this.whenAnswered) return Promise.resolve();
    this.cancelling ??= cancelUntilReady(this as never, this.transactions.streamOption, this.whenAnswered).then(() => {
      this.cancelling = undefined;
    });
    return this.cancelling;
  }

  /** Resolves when nothing of it is left on the connection beneath. */
  async whenGone(): Promise<void> {
    while (this.whenDone) await this.whenDone;
  }

  private get real(): PgConnection | undefined {
    return this.transactions.connection;
  }

  private add(job: Job): void {
    const { lostBecause } = this;
    if (lostBecause) {
      process.nextTick(() => job.reject(lostBecause()));
      return;
    }
    this.queue.push(toldOnce(job));
    void this.next();
  }

  private async next(): Promise<void> {
    if (this.whenDone) return;
    const job = this.queue.shift();
    const work = job ? this.run(job) : this.lostBecause && this.transaction && this.rollback();
    if (!work) return;
    this.current = job;
    let deliver: unknown;
    this.whenDone = work.then(
      (delivery) => {
        deliver = delivery;
      },
      (error) => {
        deliver = () => job?.reject(error);
      },
    );
    await this.whenDone;
    this.whenDone = undefined;
    this.movedAt = performance.now();
    // As with pg, a result comes when the next statement can be sent.
    if (this.queue.length === 0) this.current = undefined;
    if (typeof deliver === 'function') deliver();
    if (this.queue.length > 0 || this.lostBecause) await this.next();
    else this.emit('drain');
  }

  /** @returns what tells of the result, when the connection is ready */
  private async run(job: Job): Promise<() => void> {
    if (!this.transaction) this.request = this.transactions.currentRequest;
    const control = controlOf(job.text);
    if (control) {
      const command = await this.control(control);
      return () => job.resolve({ command, rowCount: null, oid: null, rows: [], fields: [] });
    }
    const isAlone = this.transaction === undefined;
    if (isAlone) await this.begin({});
    try {
      // While it waited for its turn.
      if (this.lostBecause) throw this.lostBecause();
      const result = await this.send(job);
      if (isAlone) await (this.getTransactionStatus() === 'E' ? this.rollback() : this.commit());
      return () => job.resolve(result);
    } catch (error) {
      job.reject(error);
      if (isAlone && this.transaction) await this.rollback();
      return () => {};
    }
  }

  private async send(job: Job): Promise<unknown> {
    const transaction = this.transaction as NonNullable<typeof this.transaction>;
    for (const name of localSettingsIn(job.text, job.values)) {
      if (transaction.settings.has(name) || this.getTransactionStatus() === 'E') continue;
      const { rows } = await this.ask('SELECT pg_catalog.current_setting($1, true) AS value', [name]);
      transaction.settings.set(name, rows[0]?.value ?? '');
    }
    return this.sending((real) => job.send(real));
  }

  private async control(control: Control): Promise<string> {
    if (control.kind === 'unsupported') {
      throw this.unsupported('BEGIN, COMMIT or ROLLBACK among several statements in one raw text would end the transaction of the test.');
    }
    if (control.kind === 'set') {
      this.refuseOtherIsolation(control.modes);
      if (control.modes.readOnly && this.transaction) await this.ask('SET LOCAL transaction_read_only = on');
      return 'SET';
    }
    if (control.kind === 'begin') {
      if (!this.transaction) await this.begin(control.modes);
      return 'BEGIN';
    }
    if (!this.transaction) return control.kind === 'commit' ? 'COMMIT' : 'ROLLBACK';
    if (control.kind === 'commit' && this.getTransactionStatus() !== 'E') {
      await this.commit();
      return 'COMMIT';
    }
    await this.rollback();
    return 'ROLLBACK';
  }

  private async begin(modes: TransactionModes): Promise<void> {
    this.refuseOtherIsolation(modes);
    const test = await this.transactions.take(this);
    const savepoint = `express_knex_session_${++units}`;
    try {
      await this.ask(beginSql(savepoint, modes.readOnly));
    } catch (error) {
      this.transactions.pass(this);
      throw error;
    }
    this.transaction = { test, savepoint, settings: new Map() };
  }

  private async commit(): Promise<void> {
    const { savepoint, settings } = this.transaction as NonNullable<typeof this.transaction>;
    const literals = [...settings].map(([name, value]): [string, string] => [literal(name), literal(value)]);
    try {
      await this.ask(commitSql(savepoint, literals));
    } catch (error) {
      await this.rollback();
      throw error;
    }
    this.leave();
  }

  private async rollback(): Promise<void> {
    const { savepoint, test } = this.transaction as NonNullable<typeof this.transaction>;
    try {
      if (!test.isOver) await this.ask(rollbackSql(savepoint));
    } catch {
      // The connection beneath is lost, and all with it.
    }
    this.leave();
  }

  private leave(): void {
    this.transaction = undefined;
    this.transactions.pass(this);
  }

  private refuseOtherIsolation({ isolationLevel }: TransactionModes): void {
    const own = this.transactions.isolationLevel;
    if (isolationLevel === undefined || own === undefined || isolationLevel === own) return;
    throw this.unsupported(
      `The isolation level '${isolationLevel}' cannot be had inside the transaction of the test, which has '${own}'. ` +
        `Pass testDatabase(knex, { isolationLevel: '${isolationLevel}' }).`,
    );
  }

  private unsupported(why: string): SessionError {
    const error = new SessionError('ERR_TEST_UNSUPPORTED', `${why} Or test this without testDatabase().`);
    this.transactions.note(error, this.request);
    return error;
  }

  private ask(text: string, values?: unknown[]): Promise<{ rows: { value?: string }[] }> {
    return this.sending((real) => queryJob({ text, ...(values && { values }) }).send(real)) as Promise<{ rows: { value?: string }[] }>;
  }

  /** The connection beneath is ready when this has ended, and nothing is on its way that could hit the next statement. */
  private async sending<T>(send: (real: PgConnection) => Promise<T>): Promise<T> {
    const { real } = this;
    if (!real || this.transaction?.test.isOver) throw this.lostBecause?.() ?? new Error('Connection terminated');
    this.sendingOn = real;
    // Before it is sent: pg tells of the end when nobody has had time to listen for it.
    const { whenLost } = this.transactions;
    const sent = send(real);
    this.whenAnswered = Promise.race([sent.then(noop, noop).then(() => whenReady(real)), whenLost]).then(noop);
    try {
      return await sent;
    } catch (error) {
      // Told at once, as pg does.
      this.current?.reject(error);
      throw error;
    } finally {
      await this.whenAnswered;
      this.sendingOn = undefined;
      this.whenAnswered = undefined;
      await this.cancelling;
    }
  }
}

function noop(): void {}

function literal(value: string): string {
  return `'${value.replaceAll("'", "''")}'`;
}
