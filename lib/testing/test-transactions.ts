import { performance } from 'node:perf_hooks';
import type { Knex } from 'knex';
import type { IsolationLevel } from '../beginning';
import { Deadline, settledWithin } from '../deadline';
import { SessionError } from '../errors';
import { streamOptionOf } from '../knex-face';
import { endAtOnce, observeStatus, type PgConnection, transactionStatus } from '../postgres';
import { runCommand } from '../send';
import { Requests, type TestRequest } from './requests';
import { beginSql, rollbackSql } from './simulated-commit';

/** What takes turns on the connection of the tests: a transaction, as the application sees it. */
export interface Unit {
  /** Whose it is, if it is not the test's own. */
  readonly request: TestRequest | undefined;
  /** Whether it has no statement under way. */
  readonly isIdle: boolean;
  readonly movedAt: number;
  lose(reason: () => Error): void;
  whenGone(): Promise<void>;
}

/** One test, or what surrounds several. */
export interface Test {
  readonly isOver: boolean;
}

class RunningTest implements Test {
  isOver = false;
  readonly failures: SessionError[] = [];

  constructor(
    readonly savepoint: string | undefined,
    /** Whether it surrounds no others. */
    readonly isWhole: boolean,
  ) {}
}

interface Waiter {
  readonly unit: Unit;
  readonly since: number;
  readonly deadline: Deadline;
  resolve(test: Test): void;
  reject(error: unknown): void;
}

/**
 * The transaction that tests run in, on one connection of the application's pool: who may use it when, and how a test begins and ends.
 */
export class TestTransactions {
  connection: PgConnection | undefined;
  isolationLevel: IsolationLevel | undefined;

  private readonly tests: RunningTest[] = [];
  private readonly requests = new Requests(() => this.top);
  private holder: Unit | undefined;
  private waiters: Waiter[] = [];
  private hasBegun = false;
  private onQuiet: (() => void) | undefined;
  private last: Promise<unknown> = Promise.resolve();
  /** Whether the connection has ended by itself. */
  isLost = false;
  /** Settles with the end of the connection, or when it is given back. */
  whenLost: Promise<void> = Promise.resolve();
  private markLost = (): void => {};

  /** pg's `stream`, as the application has configured it: another way to the server. */
  get streamOption(): unknown {
    return streamOptionOf(this.knex.client);
  }

  constructor(
    private readonly knex: Knex,
    private readonly options: { isolationLevel: IsolationLevel | undefined; waitTimeout: number },
  ) {}

  /** @param isWhole whether no other test can be begun in it; one that is left is ended then */
  begin({ isWhole = false } = {}): Promise<Test> {
    return this.inTurn(async () => {
      while (this.top?.isWhole) await this.end(this.top);
      let savepoint: string | undefined;
      if (this.top) {
        savepoint = `express_knex_session_test_${this.tests.length}`;
        await this.whenQuiet();
        if (this.holder) throw leftOpen(`begin() was called while ${nameOf(this.holder)} had a transaction open.`);
        await runCommand(this.connection as PgConnection, { text: beginSql(savepoint) });
      } else await this.connect();
      const test = new RunningTest(savepoint, isWhole);
      this.tests.push(test);
      return test;
    });
  }

  /** @param test the last one that was begun, unless another one is meant */
  rollback(test?: Test): Promise<void> {
    return this.inTurn(async () => {
      const ending = (test as RunningTest | undefined) ?? this.top;
      if (!ending) throw notRunning('rollback() was called without begin().');
      if (ending.isOver) throw notRunning('The test has ended late: the next one had begun, and ended it. Has the runner given it up?');
      const running = await this.requests.leftIn(ending);
      for (const name of running) ending.failures.push(leftOpen(`The test has ended while ${name} was still running. Await its response.`));
      // What has been answered may not have settled yet: hooks, commitAt: 'finish', a client that has left.
      await this.whenQuiet();
      const { holder } = this;
      if (holder && !running.includes(nameOf(holder))) {
        ending.failures.push(
          leftOpen(`${capitalised(nameOf(holder))} has left a transaction open. Commit it or roll it back, and await that.`),
        );
      }
      await this.end(ending);
      const [first, ...others] = new Map(ending.failures.map((failure) => [failure.message, failure])).values();
      if (first) throw others.length === 0 ? first : new AggregateError([first, ...others], [first, ...others].map(messageOf).join('\n'));
    });
  }

  /**
   * Waits for a unit's turn.
   *
   * @throws SessionError if no test is running, or the unit in front will not end
   */
  take(unit: Unit): Promise<Test> {
    const test = this.tests.at(-1);
    if (!test) {
      // Who has forgotten begin() may see only that a request is answered with 503.
      if (!this.hasBegun) this.knex.client.logger.warn(NO_TEST);
      this.hasBegun = true;
      return Promise.reject(notRunning(NO_TEST));
    }
    if (this.requests.current?.test?.isOver) {
      return Promise.reject(
        notRunning(`${nameOf(unit)} goes on after the end of its test. Await its response there, and all that it does.`),
      );
    }
    if (this.holder === undefined) {
      this.holder = unit;
      return Promise.resolve(test);
    }
    return new Promise((resolve, reject) => {
      const waiter = { unit, since: performance.now(), deadline: new Deadline(), resolve, reject };
      this.waiters.push(waiter);
      this.watch(waiter);
    });
  }

  pass(unit: Unit): void {
    if (this.holder !== unit) return;
    const next = this.waiters.shift();
    this.holder = next?.unit;
    if (next) {
      next.deadline.clear();
      next.resolve(this.tests.at(-1) as Test);
    } else this.onQuiet?.();
  }

  /** A unit that does not want its turn any more. */
  leave(unit: Unit, error: unknown): void {
    const waiter = this.waiters.find((waiting) => waiting.unit === unit);
    if (!waiter) return;
    this.waiters = this.waiters.filter((waiting) => waiting !== waiter);
    waiter.deadline.clear();
    waiter.reject(error);
  }

  /** An error that a request may swallow, or answer with something that says nothing. */
  note(error: SessionError, request: TestRequest | undefined): void {
    // A copy: Knex puts the statement into the message of the one that it passes on.
    if (request) this.tests.at(-1)?.failures.push(new SessionError(error.code, error.message));
  }

  /** Whoever waits for a unit that does nothing waits for ever, if that one waits for him. */
  private watch(waiter: Waiter): void {
    const { waitTimeout } = this.options;
    const idleSince = Math.max(waiter.since, this.holder?.movedAt ?? 0);
    const rest = this.holder?.isIdle ? Math.ceil(idleSince + waitTimeout - performance.now()) : waitTimeout;
    if (rest > 0) {
      waiter.deadline.set(rest, () => this.watch(waiter));
      return;
    }
    const error = new SessionError('ERR_TEST_BLOCKED', blocked(waiter.unit, this.holder as Unit, waitTimeout));
    this.note(error, waiter.unit.request);
    this.leave(waiter.unit, error);
  }

  /** Those that wait come first: when the one in front is lost, its turn would pass to them. */
  private get units(): Unit[] {
    return [...this.waiters.map(({ unit }) => unit), ...(this.holder ? [this.holder] : [])];
  }

  private async whenQuiet(): Promise<void> {
    if (this.holder === undefined) return;
    const quiet = new Promise<void>((resolve) => {
      this.onQuiet = resolve;
    });
    await settledWithin(this.options.waitTimeout, quiet);
    this.onQuiet = undefined;
  }

  /** The request that the running code works for; undefined in the test itself. */
  get currentRequest(): TestRequest | undefined {
    return this.requests.current?.name === undefined ? undefined : this.requests.current;
  }

  /** Runs the work of a test so that what it still does when it is over is refused. */
  run<T>(test: Test, work: () => T): T {
    return this.requests.runTest(test as RunningTest, work);
  }

  /** The connection pool is to be destroyed, and would wait for the test. */
  abandon(): Promise<void> {
    return this.inTurn(async () => {
      if (!this.top) return;
      while (this.top) await this.end(this.top);
      throw leftOpen(
        'knex.destroy() was called before the end of a test. Is rollback() missing? afterEach(database.rollback), or afterAll() in the same describe() as beforeAll().',
      );
    });
  }

  private get top(): RunningTest | undefined {
    return this.tests.at(-1);
  }

  /** Tests begin and end one after the other. */
  private inTurn<T>(work: () => Promise<T>): Promise<T> {
    const done = this.last.then(work);
    this.last = done.catch(() => {});
    return done;
  }

  private async connect(): Promise<void> {
    const connection: PgConnection = await this.knex.client.acquireConnection();
    observeStatus(connection);
    connection.on('error', this.onLost);
    connection.on('end', this.onLost);
    this.connection = connection;
    this.hasBegun = true;
    this.requests.start();
    this.isLost = false;
    this.whenLost = new Promise((resolve) => {
      this.markLost = resolve;
    });

    const { isolationLevel } = this.options;
    try {
      await runCommand(connection, { text: isolationLevel ? `BEGIN ISOLATION LEVEL ${isolationLevel}` : 'BEGIN' });
      this.isolationLevel = isolationLevel ?? (await showIsolationLevel(connection));
    } catch (error) {
      this.release(error);
      throw error;
    }
  }

  private readonly onLost = (error?: unknown): void => {
    if (this.isLost) return;
    this.isLost = true;
    this.markLost();
    for (const unit of this.units) unit.lose(() => (error instanceof Error ? error : new Error('The connection to the database ended.')));
  };

  /** Rolls a test back, whatever is still under way in it. */
  private async end(test: RunningTest): Promise<void> {
    const { connection, units } = this;
    test.isOver = true;
    this.tests.splice(this.tests.indexOf(test), 1);
    if (!connection) return;
    for (const unit of units) unit.lose(() => notRunning('The test has ended, and was rolled back.'));
    await settledWithin(END_TIMEOUT_MS, Promise.all(units.map((unit) => unit.whenGone())));
    let failure: unknown;
    if (!this.isLost) {
      failure = new SessionError(
        'ERR_SESSION_UNAVAILABLE',
        'The database has not answered the ROLLBACK of the test; its connection is given up.',
      );
      const ended = runCommand(connection, { text: test.savepoint ? rollbackSql(test.savepoint) : 'ROLLBACK' }).then(
        () => {
          failure = undefined;
        },
        (error) => {
          failure = error;
        },
      );
      await settledWithin(END_TIMEOUT_MS, ended);
      if (failure instanceof SessionError) test.failures.push(failure);
    }
    if (this.tests.length > 0) return;
    this.release(failure);
    // On a dead network they are not gone, and hold what is no more.
    this.holder = undefined;
    this.waiters = [];
  }

  private release(failure: unknown): void {
    const { connection } = this;
    if (!connection) return;
    this.markLost();
    this.requests.stop();
    this.connection = undefined;
    connection.removeListener('error', this.onLost);
    connection.removeListener('end', this.onLost);
    if (failure !== undefined || this.isLost || transactionStatus(connection) !== 'I') {
      connection.__knex__disposed ??= failure ?? new Error('The connection of a test is not clean.');
      endAtOnce(connection);
    }
    this.knex.client.releaseConnection(connection);
  }
}

function showIsolationLevel(connection: PgConnection): Promise<IsolationLevel> {
  return new Promise((resolve, reject) => {
    connection.query('SHOW transaction_isolation', (error, result) => {
      if (error) reject(error);
      else
        resolve(
          (result as unknown as { rows: { transaction_isolation: IsolationLevel }[] }).rows[0]?.transaction_isolation as IsolationLevel,
        );
    });
  });
}

const NO_TEST =
  'No test is running on this database. Begin one first: beforeEach(database.begin). It is rolled back before the afterEach hooks that come later; ' +
  'it.concurrent has no hooks.';

function nameOf({ request }: Unit): string {
  return request?.name ?? 'the test';
}

function blocked(waiting: Unit, holder: Unit, waitTimeout: number): string {
  const isOwn = waiting.request !== undefined && waiting.request === holder.request;
  const whose = isOwn ? 'another transaction of its own' : `the transaction of ${nameOf(holder)}`;
  const remedy = isOwn
    ? 'Use req.session for every statement of the request, or end it before (req.session.commit()).'
    : 'If that one waits for this one, neither can go on: send the one after the end of the other.';
  return (
    `${capitalised(nameOf(waiting))} has waited for ${waitTimeout} ms (waitTimeout) for ${whose}, which is open and runs nothing. ` +
    `In a test all transactions run on one connection, one after the other. ${remedy}`
  );
}

function leftOpen(message: string): SessionError {
  return new SessionError('ERR_TEST_LEFT_OPEN', message);
}

function notRunning(message: string): SessionError {
  return new SessionError('ERR_TEST_NOT_RUNNING', message);
}

function capitalised(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function messageOf({ message }: Error): string {
  return message;
}

/** For a server that does not answer any more; twice, in less than a test runner waits for a hook. */
const END_TIMEOUT_MS = 1_500;
