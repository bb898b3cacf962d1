import type { Knex } from 'knex';
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

  /** What has become of the work so far. */
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
