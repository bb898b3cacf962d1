import type { Knex } from 'knex';
import { assertKnex } from './assert-knex';
import { KnexFace } from './knex-face';
import { describe, resolveOptions, type SessionOptions } from './options';
import { report } from './report';
import { SessionScope } from './scope';
import type { Session } from './session';
import { Transaction } from './transaction';

export type WithSessionOptions = Pick<SessionOptions, 'onError'>;

/**
 * The same unit of work outside a request: in a job, a script, for one event of a stream.
 *
 * 1. The transaction begins with the first statement of `work`; if there is none, no connection is taken.
 * 2. It is committed when the promise of `work` resolves, and rolled back when it rejects.
 * 3. Returns what `work` returns, after COMMIT has succeeded; rejects with the error of `work`, or of a COMMIT that failed.
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
  const { onError } = resolveOptions(options, { of: 'withSession()', known: ['onError'] });
  const face = KnexFace.of(knex);
  const transaction = new Transaction({
    connect: () => face.connect(scope),
    assertUsable: () => {},
    onFirstUse: () => {},
    onError: (error) => report(knex, onError, error),
  });
  const scope: SessionScope = new SessionScope(transaction);
  face.dress(scope);

  let result: T;
  try {
    result = await work(scope.face);
  } catch (error) {
    await scope.fail(error, 'withSession() has been rolled back by an error.').catch(() => {});
    throw error;
  }
  await scope.settle('commit', 'withSession() has ended. Await every statement before its callback returns.');
  return result;
}
