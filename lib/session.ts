import type { Knex } from 'knex';
import type { Settings } from './beginning';
import type { Outcome } from './transaction';

/**
 * A database session: one unit of work, used as the `Knex.Transaction` that it is.
 *
 * 1. It begins with the first statement and ends with the request (or with {@link withSession}'s callback).
 * 2. Statements run one after the other on one connection, also if they were issued together.
 * 3. `commit()` and `rollback()` end it now, and reject if they fail; a statement after that gets `ERR_SESSION_CLOSED`.
 * 4. `transaction()` and `savepoint()` open a savepoint.
 *
 * @example
 * app.post('/transfers', async (req, res) => {
 *   await req.session('entries').insert(debit);
 *   await req.session('entries').insert(credit);
 *   res.status(201).end();
 * });
 */
export interface Session<TRecord extends {} = any, TResult = any[]> extends Knex.Transaction<TRecord, TResult> {
  /**
   * Makes sure that the session is rolled back at its end, whatever the response says.
   *
   * 1. The response goes out as it is; statements still work until then.
   * 2. `commit()` is refused from now on (`ERR_ROLLBACK_ONLY`).
   *
   * @param reason for whoever debugs; kept, not sent
   * @throws SessionClosedError after the session's end
   * @example
   * if (dryRun) req.session.setRollbackOnly('dry run');
   */
  setRollbackOnly(reason?: unknown): void;

  /**
   * Commits now, gives the connection back, and lets the next statement begin anew: before a slow call in mid-request.
   *
   * 1. Resolves when COMMIT has succeeded; what came before is stored, whatever becomes of the rest. Hooks registered so far run.
   * 2. The next statement takes a connection again, under the same options and settings.
   * 3. Statements that are issued while it is under way are refused: await it.
   *
   * @throws the error of a COMMIT that failed, and the session has ended then; SessionError `ERR_ROLLBACK_ONLY` after `setRollbackOnly()`,
   *   `ERR_SAVEPOINT_OPEN` while a savepoint is open, `ERR_SESSION_CLOSED` after the session's end
   * @example
   * await req.session('orders').insert(order);
   * await req.session.checkpoint();
   * const receipt = await chargeCard(order); // takes seconds, and holds no connection
   * await req.session('receipts').insert(receipt);
   */
  checkpoint(): Promise<void>;

  /**
   * Adds run-time settings of PostgreSQL, for this session only (`set_config(name, value, true)`).
   *
   * 1. Before the first statement they go with BEGIN; after it they are a statement.
   * 2. They hold up to the session's end, also after a `checkpoint()`; in a savepoint, up to its rollback.
   *
   * @throws SessionError `ERR_SESSION_OPTIONS` for an empty name, or something that is no value; the server's error for a name it does not know
   * @example
   * await req.session.set({ 'app.user': user.id });
   */
  set(settings: Settings): Promise<void>;

  /**
   * Calls back in the session, just before it commits: a throw rolls it back, and is the request's error.
   *
   * 1. Hooks run in the order in which they were registered, each awaited.
   * 2. One that was registered on a savepoint is dropped if that is rolled back.
   *
   * @throws SessionError `ERR_SESSION_CLOSED` after the session's end
   * @example
   * req.session.beforeCommit(async (session) => {
   *   await session('audit').insert({ url: req.originalUrl });
   * });
   */
  beforeCommit(hook: (session: Session) => unknown): void;

  /**
   * Calls back when COMMIT has succeeded, and before the response leaves. Also if there was nothing to commit.
   *
   * 1. `session` is another one, whose work is committed when the hook has ended. A slow hook keeps the response, but no connection.
   * 2. What a hook throws goes to `onError`: the work is stored, and the others run.
   * 3. After `ERR_COMMIT_UNKNOWN` neither these nor those of {@link afterRollback} run.
   *
   * @throws SessionError `ERR_SESSION_CLOSED` after the session's end
   * @example
   * req.session.afterCommit(() => mails.send(welcome));
   */
  afterCommit(hook: (session: Session) => unknown): void;

  /**
   * Calls back when the work has been rolled back, for whatever reason, and before the response leaves.
   *
   * 1. `session` is another one, whose work is committed when the hook has ended.
   * 2. What a hook throws goes to `onError`, and the others run. After `ERR_COMMIT_UNKNOWN` none does.
   *
   * @throws SessionError `ERR_SESSION_CLOSED` after the session's end
   * @example
   * req.session.afterRollback(() => files.remove(upload));
   */
  afterRollback(hook: (session: Session) => unknown): void;

  /** Opens a savepoint, to be ended by its own `commit()` or `rollback()`. */
  transaction(config?: Knex.TransactionConfig): Promise<Session>;
  /** Opens a savepoint, to be ended by its own `commit()` or `rollback()`. */
  transaction(scope?: null, config?: Knex.TransactionConfig): Promise<Session>;
  /**
   * Runs a function in a savepoint. That is a session too: its hooks are dropped, and its settings undone, if it is rolled back.
   *
   * @example
   * await req.session.transaction(async (savepoint) => {
   *   await savepoint('orders').insert(order);
   *   savepoint.afterCommit(() => mails.send(receipt));
   * });
   */
  // biome-ignore lint/suspicious/noConfusingVoidType: as Knex has it.
  transaction<T>(scope: (savepoint: Session) => Promise<T> | void, config?: Knex.TransactionConfig): Promise<T>;

  /** As {@link transaction} with a function. */
  savepoint<T = any>(scope: (savepoint: Session) => any): Promise<T>;

  /**
   * What has become of the work so far; after a `checkpoint()`, of what came since.
   *
   * @example
   * res.once('finish', () => log.info({ url: req.originalUrl, outcome: req.session.outcome }));
   */
  readonly outcome: Outcome;

  /**
   * Aborts when the session is given up while the handler still works for it: pass it on to whatever else that takes time.
   *
   * 1. The client has gone (unless `onDisconnect` is `'finish'`), `transactionTimeout` has passed, or `drain()` has ended its patience.
   * 2. `signal.reason` is the `SessionError` that says which; the statement that runs is cancelled, and rejects with it.
   * 3. It does not abort when the session ends in any other way.
   *
   * @example
   * const rates = await fetch(url, { signal: req.session.signal });
   */
  readonly signal: AbortSignal;
}
