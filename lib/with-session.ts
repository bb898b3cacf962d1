import type { Knex } from 'knex';
import { assertKnex } from './assert-knex';
import type { IsolationLevel, Settings } from './beginning';
import { describe } from './describe';
import type { SessionOptions } from './options';
import { report } from './report';
import { fixedFor, resolveOptions, termsOf } from './resolve-options';
import type { Session } from './session';
import { runUnitOfWork } from './unit-of-work';

/** The options of {@link withSession}: those of {@link SessionOptions} that need no request, as values; times in ms. */
export interface WithSessionOptions extends Pick<SessionOptions, 'onError'> {
  /** How long the first statement may wait for a connection. @default 5000 */
  acquireTimeout?: number | undefined;
  /** How long the transaction may stay open; 0 is no limit. @default 30000 */
  transactionTimeout?: number | undefined;
  /** How long COMMIT or ROLLBACK may take. @default 10000 */
  settleTimeout?: number | undefined;
  /** After how long `onError` is told of a transaction that is still open; 0 is never. @default 0 */
  warnAfter?: number | undefined;
  /** The isolation level of the transaction. @default the server's */
  isolationLevel?: IsolationLevel | undefined;
  /** Whether the transaction may only read. @default the server's */
  readOnly?: boolean | undefined;
  /** Whether a read-only serializable transaction waits for a moment in which it cannot fail. @default the server's */
  deferrable?: boolean | undefined;
  /** Run-time settings for this transaction only. @default none */
  settings?: Settings | undefined;
  /** The role that the statements run as. @default the one that has connected */
  role?: string | undefined;
}

/**
 * The same unit of work outside a request: in a job, a script, for one event of a stream.
 *
 * 1. The transaction begins with the first statement of `work`; if there is none, no connection is taken.
 * 2. It is committed when the promise of `work` resolves, and rolled back when it rejects.
 * 3. If it is open for longer than `transactionTimeout`, it is rolled back and the promise rejects with `ERR_SESSION_TIMEOUT`, even if
 *    `work` never ends: look at `session.signal` in there.
 * 4. Returns what `work` returns, after COMMIT has succeeded; rejects with the error of `work`, or of a COMMIT that failed.
 *
 * @throws TypeError if an argument is not what it should be; SessionError and the driver's errors as those of a request
 * @example
 * const id = await withSession(knex, async (session) => {
 *   const [row] = await session('jobs').insert({ kind: 'report' }).returning('id');
 *   return row.id;
 * });
 */
export async function withSession<T>(knex: Knex, work: (session: Session) => Promise<T> | T, options?: WithSessionOptions): Promise<T> {
  assertKnex(knex);
  if (typeof work !== 'function') {
    throw new TypeError(`Expected \`work\` to be a function (session) => ..., got ${describe(work)}.`);
  }
  const resolved = resolveOptions(options, { of: 'withSession()', known: KNOWN, hasRequest: false });
  return runUnitOfWork(
    {
      knex,
      terms: (added) => termsOf(fixedFor(resolved, undefined), added),
      report: (error) => report(knex, resolved.onError, error),
      texts: TEXTS,
      isFirstUseNoted: resolved.warnAfter !== 0,
    },
    work,
  );
}

const KNOWN: readonly (keyof WithSessionOptions)[] = [
  'acquireTimeout',
  'transactionTimeout',
  'settleTimeout',
  'warnAfter',
  'isolationLevel',
  'readOnly',
  'deferrable',
  'settings',
  'role',
  'onError',
];

const TEXTS = {
  interrupted: 'withSession() was open for too long, and its work was rolled back. See `cause`.',
  failed: 'withSession() has been rolled back by an error.',
  ended: 'withSession() has ended. Await every statement before its callback returns.',
};
