import type { Knex } from 'knex';
import { assertKnex } from './assert-knex';
import type { SessionError } from './errors';
import { KnexFace } from './knex-face';
import { describe, type Limits, resolveOptions, type SessionOptions } from './options';
import { report } from './report';
import { SessionScope } from './scope';
import type { Session } from './session';
import { Transaction } from './transaction';

/** Those of `sessionMiddleware` that need no request; times in ms. */
export interface WithSessionOptions extends Pick<SessionOptions, 'onError'> {
  /** @default 5000 */
  acquireTimeout?: number | undefined;
  /** @default 30000 */
  transactionTimeout?: number | undefined;
  /** @default 10000 */
  settleTimeout?: number | undefined;
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
 * @throws TypeError if an argument is not what it should be
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
  const face = KnexFace.of(knex);
  let onInterrupt!: (reason: SessionError) => void;
  const interrupted = new Promise<never>((_, reject) => {
    onInterrupt = reject;
  });
  const transaction = new Transaction({
    connect: (isWanted) => face.connect(scope, isWanted),
    assertUsable: () => {},
    onFirstUse: () => resolved as Limits,
    onSignal: () => {},
    onInterrupt: (reason) => {
      onInterrupt(reason);
      scope.fail(reason, HAS_BEEN_GIVEN_UP).catch(() => {});
    },
    onReleased: () => {},
    onError: (error) => report(knex, resolved.onError, error),
  });
  const scope: SessionScope = new SessionScope(transaction);
  face.dress(scope);

  let result: T;
  try {
    result = await Promise.race([work(scope.face), interrupted]);
  } catch (error) {
    await scope.fail(error, 'withSession() has been rolled back by an error.').catch(() => {});
    throw error;
  }
  await scope.settle('commit', 'withSession() has ended. Await every statement before its callback returns.');
  return result;
}

const KNOWN: readonly (keyof WithSessionOptions)[] = ['acquireTimeout', 'transactionTimeout', 'settleTimeout', 'onError'];

const HAS_BEEN_GIVEN_UP = 'withSession() was open for too long, and its work was rolled back. See `cause`.';
