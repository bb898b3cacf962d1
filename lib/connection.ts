import type { Transform } from 'node:stream';
import type { Beginning, Command } from './beginning';
import { cancelUntilReady } from './cancel-request';
import { type LossWatch, watchLoss } from './connection-loss';
import { CommitUnknownError, SessionError, SessionUnavailableError, TransactionAbortedError } from './errors';
import { destroyStream } from './open-streams';
import {
  COMPLETION_UNKNOWN,
  endAtOnce,
  isGivenUp,
  isReady,
  isServerError,
  observeStatus,
  type PgConnection,
  QUERY_CANCELED,
  type Statement,
  transactionStatus,
  whenReady,
} from './postgres';
import {
  hasFoundNoBegin,
  holdTogether,
  isComplete,
  isGroupable,
  type Preamble,
  precededBy,
  runCommand,
  type SendQuery,
  StatementConnection,
  sendTo,
} from './send';

/** A Knex client, as far as a connection uses it; its calls emit Knex's events. */
export interface KnexClient {
  query(connection: unknown, statement: Statement): Promise<unknown>;
  stream(connection: unknown, statement: Statement, stream: Transform, options: unknown): Promise<unknown>;
  emit(event: string, ...values: unknown[]): boolean;
}

/** Where a transaction lives: on a connection of the pool, or as a savepoint in someone else's transaction. */
export interface Connection {
  readonly knexUid: string | undefined;
  readonly hasBegun: boolean;
  /** Whether the next statement may be sent before the last one is answered. */
  readonly takesMore: boolean;
  /** Set as soon as the connection is known to be dead. */
  readonly lostBecause: unknown;
  /** Begins, if that has not happened yet, and runs the statement. */
  query(client: KnexClient, statement: Statement, txid: string | undefined): Promise<unknown>;
  stream(client: KnexClient, statement: Statement, txid: string | undefined, stream: Transform, options: unknown): Promise<unknown>;
  /** Waits until the next statement can be sent; true at once if that is now, false if the connection is lost. */
  whenReady(): Promise<boolean> | true;
  /** Whether the transaction has ended without {@link commit} or {@link rollback}; known while ready. */
  hasEndedByItself(): boolean;
  /** Takes note of what settings are before they are set, if they do not end with the transaction. */
  beforeSet?(settings: readonly [name: string, value: string][]): Promise<void>;
  /** Resolves only if the server has said that it committed. @param abortedBy the error that a refusal is due to */
  commit(abortedBy: unknown): Promise<void>;
  rollback(): Promise<void>;
  /** Gives the connection back, or destroys it: if there is a reason to, or if it is not clean. */
  release(reason?: unknown): void;
  /** Cancels the statement that runs; resolves when it has ended and nothing can be hit by a late cancel. May take for ever. */
  cancel(): Promise<void>;
  /** Ends the connection at once, without a word to the server: whatever runs or waits on it fails. */
  destroy(reason: Error): void;
}

/** What a {@link PooledConnection} needs of the Knex instance that it comes from. */
export interface Pool {
  readonly source: object;
  readonly client: KnexClient;
  /** Gives the connection back; with a reason, it is never handed out again. @param client whose connection it was */
  release(connection: PgConnection, reason: unknown, client: KnexClient): void;
  /** Whether its client sends statements as Knex does. */
  readonly sendsAsKnex: boolean;
  /** pg's `stream`, as the application has configured it: another way to the server. */
  readonly streamOption: unknown;
}

/** A connection of the application's pool, with a transaction of its own. */
export class PooledConnection implements Connection {
  hasBegun: boolean;
  takesMore = false;
  lostBecause: unknown;
  /** Settles when BEGIN was answered. */
  private beginningWith: Promise<unknown> | undefined;
  private readonly watch: LossWatch;
  private cancelling: Promise<void> | undefined;
  private whenLost: Set<() => void> | undefined;

  /** @param client receives the events of the commands that the session sends itself, as with `knex.transaction()` */
  constructor(
    private readonly pg: PgConnection,
    private readonly pool: Pool,
    private readonly client: KnexClient,
    private readonly txid: string,
    private readonly beginning: Beginning,
  ) {
    // Nothing to begin: statements that commit by themselves.
    this.hasBegun = beginning.commands.length === 0;
    observeStatus(pg);
    this.watch = watchLoss(pg);
    this.watch.onLost = this.onLost;
  }

  get knexUid(): string | undefined {
    return this.pg.__knexUid;
  }

  /** Ready, not in a transaction, and no cancel on its way. */
  get isClean(): boolean {
    const status = transactionStatus(this.pg);
    return (
      isReady(this.pg) &&
      this.cancelling === undefined &&
      (status === 'I' || (status === null && (!this.hasBegun || this.beginning.commands.length === 0)))
    );
  }

  query(client: KnexClient, statement: Statement, txid: string | undefined): Promise<unknown> {
    if (this.cancelling) {
      // It would be hit, where those in front are not waited for.
      this.takesMore = false;
      return this.cancelling.then(() => this.query(client, statement, txid));
    }
    this.takesMore = this.pg.pipeline === true && isGroupable(statement);
    if (this.takesMore) holdTogether(this.pg);
    if (this.hasBegun) {
      return this.send(client, statement, txid);
    }
    if (this.beginningWith) return this.follow(client, statement, txid);
    const first = this.queryFirst(client, statement, txid);
    if (this.takesMore) {
      // Behind all that `first` does itself: those that wait for it look at `hasBegun` then.
      this.beginningWith = first.then(noop, noop).then(() => {
        this.beginningWith = undefined;
      });
    }
    return first;
  }

  /** Together with BEGIN, if that can be done. */
  private async queryFirst(client: KnexClient, statement: Statement, txid: string | undefined): Promise<unknown> {
    for (const command of this.beginning.commands) this.announce(command);
    const preamble: Preamble = { commands: this.beginning.commands, isRequested: false, completed: 0 };
    const grouped = isGroupable(statement) ? precededBy(this.pg, preamble) : undefined;
    if (grouped === undefined) {
      this.takesMore = false;
      await this.begin();
      return this.send(client, statement, txid);
    }
    let result: unknown;
    try {
      result = await this.pool.client.query.call(client, this.sending(grouped, txid), statement);
    } catch (error) {
      if (isGivenUp(error)) throw error;
      // The answer to BEGIN may still be on its way behind an error of the driver's own.
      const isAlive = await this.whenReady();
      if (isComplete(preamble) || !preamble.isRequested) throw error;
      if (isAlive && preamble.completed > 0 && isRefusal(error)) {
        preamble.completed = preamble.commands.length;
        throw settingsRefused(error);
      }
      throw this.failedToBegin(error);
    } finally {
      this.hasBegun = isComplete(preamble);
    }
    if (this.hasBegun) return result;
    const error = new SessionError('ERR_TRANSACTION_CONTROL', SENT_WITHOUT_BEGIN);
    this.lostBecause ??= error;
    throw error;
  }

  /** Before BEGIN was answered: not without it. */
  private async follow(client: KnexClient, statement: Statement, txid: string | undefined): Promise<unknown> {
    const guarded = isGroupable(statement) && precededBy(this.pg, { commands: [], isRequested: false, completed: 0, isBehind: true });
    try {
      if (guarded) return await this.pool.client.query.call(client, this.sending(guarded, txid), statement);
      await this.beginningWith;
    } catch (error) {
      await this.beginningWith;
      if (this.hasBegun && !hasFoundNoBegin(error)) throw error;
    }
    if (this.lostBecause) throw new SessionUnavailableError(this.lostBecause);
    // If the driver has not sent what was in front, this is the first.
    return this.query(client, statement, txid);
  }

  /** When it has begun. */
  private send(client: KnexClient, statement: Statement, txid: string | undefined): Promise<unknown> {
    const isLight = this.takesMore || this.pool.sendsAsKnex;
    return this.pool.client.query.call(client, isLight ? this.sending(sendTo(this.pg), txid) : this.taggedWith(txid), statement);
  }

  /** Knex reads the transaction's id, which its events carry, from the connection: with others under way, one mark is not enough. */
  private sending(send: SendQuery, txid: string | undefined): StatementConnection {
    return new StatementConnection(this.pg.__knexUid, txid, send);
  }

  async stream(client: KnexClient, statement: Statement, txid: string | undefined, stream: Transform, options: unknown): Promise<unknown> {
    this.takesMore = false;
    await this.beginningWith;
    if (!this.hasBegun) {
      for (const command of this.beginning.commands) this.announce(command);
      await this.begin();
    }
    const done = this.pool.client.stream.call(client, this.taggedWith(txid), statement, stream, options).catch(unlessNothing);
    // The server may have sent all rows long before they are read: the next statement can run, as in a plain transaction.
    // If the transaction has failed, the stream's error is still to come.
    const ready = whenReady(this.pg).then(() => (transactionStatus(this.pg) === 'E' ? done : undefined));
    return Promise.race([done, this.lossOf(stream), ready]);
  }

  whenReady(): Promise<boolean> | true {
    if (this.lostBecause !== undefined) return Promise.resolve(false);
    if (this.cancelling === undefined && isReady(this.pg)) return true;
    // A cancel may be under way by then, and would hit what comes next.
    return whenReady(this.pg).then((isReady) => this.cancelling?.then(() => isReady) ?? isReady);
  }

  hasEndedByItself(): boolean {
    return this.hasBegun && isReady(this.pg) && transactionStatus(this.pg) === 'I';
  }

  async commit(abortedBy: unknown): Promise<void> {
    this.announce(COMMIT);
    let tag: string;
    try {
      tag = await runCommand(this.pg, COMMIT);
    } catch (error) {
      this.announce(COMMIT, error);
      // Definite only if the server lives on after its error: a FATAL one, or none at all, ends the connection.
      // (The severity is a word in the server's language, and says nothing.)
      const isDefinite = isServerError(error) && error.code !== COMPLETION_UNKNOWN && (await this.whenReady());
      throw isDefinite ? error : new CommitUnknownError(error);
    }
    if (tag === 'ROLLBACK') throw new TransactionAbortedError(abortedBy);
    if (tag !== 'COMMIT') throw new CommitUnknownError(new Error(`COMMIT was answered with '${tag}'.`));
  }

  async rollback(): Promise<void> {
    this.announce(ROLLBACK);
    await runCommand(this.pg, ROLLBACK);
  }

  release(reason?: unknown): void {
    this.watch.onLost = undefined;
    this.pg.__knexTxId = undefined;
    const unclean = this.isClean ? undefined : new Error('The connection is not clean.');
    this.pool.release(this.pg, this.lostBecause ?? reason ?? unclean, this.client);
  }

  cancel(): Promise<void> {
    if (this.lostBecause !== undefined) return Promise.resolve();
    this.cancelling ??= this.cancelStatement().then(() => {
      this.cancelling = undefined;
    });
    return this.cancelling;
  }

  private cancelStatement(): Promise<void> {
    // A connection that is lost meanwhile, be it by destroy(), leaves nothing that a late cancel could hit.
    const lost = new Promise<void>((resolve) => this.onceLost(resolve));
    return Promise.race([cancelUntilReady(this.pg, this.pool.streamOption), lost]);
  }

  destroy(reason: Error): void {
    this.lostBecause ??= reason;
    endAtOnce(this.pg);
    this.onLost();
  }

  /** If its connection is lost, the driver's stream waits for the server to close its cursor: it neither ends nor fails. */
  private lossOf(stream: Transform): Promise<never> {
    return new Promise((_, reject) => {
      if (stream.closed) return;
      const end = (): void => {
        destroyStream(stream, this.lostBecause as Error, true);
        reject(this.lostBecause);
      };
      this.onceLost(end);
      stream.once('close', () => this.whenLost?.delete(end));
    });
  }

  private async begin(): Promise<void> {
    try {
      for (const command of this.beginning.commands) {
        await runCommand(this.pg, command);
        this.hasBegun = true;
      }
    } catch (error) {
      if (this.hasBegun && isRefusal(error) && (await this.whenReady())) throw settingsRefused(error);
      throw this.failedToBegin(error);
    }
  }

  private failedToBegin(cause: unknown): SessionUnavailableError {
    this.announce(this.beginning.commands[0] as Command, cause);
    // Whatever the reason, the state of this connection is not known any more.
    this.lostBecause ??= cause;
    return new SessionUnavailableError(cause);
  }

  /** Streams need pg's own connection, and so may a client that is not as Knex has made it. */
  private taggedWith(txid: string | undefined): PgConnection {
    this.pg.__knexTxId = txid;
    return this.pg;
  }

  private announce({ text: sql, values: bindings }: Command, error?: unknown): void {
    const event = { __knexUid: this.pg.__knexUid, __knexTxId: this.txid, sql, bindings };
    if (error === undefined) this.client.emit('query', event);
    else this.client.emit('query-error', error, event);
  }

  private readonly onLost = (error?: unknown): void => {
    this.lostBecause ??= error ?? new Error('The connection to the database ended.');
    for (const end of this.whenLost ?? []) end();
  };

  private onceLost(end: () => void): void {
    this.whenLost ??= new Set();
    this.whenLost.add(end);
  }
}

function noop(): void {}

/** Knex 3.1 takes the end of pg's answer to a stream for a failure, without an error; its rows are still to be read. */
export function unlessNothing(error: unknown): void {
  if (error !== undefined && error !== null) throw error;
}

function isRefusal(error: unknown): boolean {
  return isServerError(error) && error.code !== QUERY_CANCELED;
}

/** The transaction has begun, and takes a ROLLBACK. */
function settingsRefused(cause: unknown): SessionError {
  return new SessionError(
    'ERR_SESSION_OPTIONS',
    'PostgreSQL has refused the `settings` or the `role` of the session, and nothing was run. See `cause`.',
    cause,
  );
}

const SENT_WITHOUT_BEGIN =
  "The first statement was sent without its BEGIN, and may have been committed by itself: something that wraps pg's `client.query()` has sent a copy " +
  'of what it was given. Pass that object on as it is.';

// As Knex spells them, so that listeners which look for them find them.
const COMMIT: Command = { text: 'COMMIT;' };
const ROLLBACK: Command = { text: 'ROLLBACK' };
