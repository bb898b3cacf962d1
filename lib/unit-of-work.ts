import type { Request } from 'express';
import type { Knex } from 'knex';
import { runUnitInContext } from './context';
import { routeOf } from './describe';
import { type SessionError, SessionOpenLongError } from './errors';
import { KnexFace } from './knex-face';
import type { OpenSessions } from './open-sessions';
import type { Terms } from './resolve-options';
import { SessionScope } from './scope';
import type { Session } from './session';
import { Transaction } from './transaction';

export interface UnitOfWork {
  readonly knex: Knex;
  /** Whether it stands for whichever Knex is meant, as the one that was chosen for its request. */
  readonly isChosen?: boolean;
  readonly terms: (added: readonly [string, string][]) => Terms;
  readonly isAutocommit?: boolean;
  /** That it is a hook of. */
  readonly request?: Request;
  /** Whether `warnAfter` may ask where it was first used. */
  readonly isFirstUseNoted?: boolean;
  /** Told of it as long as it holds a connection. */
  readonly openSessions?: OpenSessions;
  report(error: unknown): void;
  /** Completes "The session is closed: ...". */
  readonly texts: { readonly interrupted: string; readonly failed: string; readonly ended: string };
}

/** A session from the beginning of some work to its end: committed when its promise resolves, rolled back when it rejects. */
export async function runUnitOfWork<T>(unit: UnitOfWork, work: (session: Session) => Promise<T> | T): Promise<T> {
  const { texts, openSessions } = unit;
  const face = KnexFace.of(unit.knex);
  let onInterrupt!: (reason: SessionError) => void;
  const interrupted = new Promise<never>((_, reject) => {
    onInterrupt = reject;
  });
  const added: [string, string][] = [];
  const scope: SessionScope = new SessionScope(
    new Transaction({
      isChosen: unit.isChosen ?? false,
      request: unit.request,
      get session() {
        return scope.face;
      },
      bytesHeld: 0,
      take: (beginning) => face.take(scope, beginning),
      connect: (wish, beginning) => face.connect(scope, wish, beginning),
      assertUsable: () => {},
      onFirstUse: () => {
        const terms = unit.terms(added);
        if (!scope.transaction.isAutocommit) openSessions?.join(scope.transaction, { evenIfDraining: true });
        return terms;
      },
      onHook: () => {},
      onSet: (settings) => added.push(...settings),
      wantsAutocommit: () => unit.isAutocommit ?? false,
      willRepeat: () => false,
      runHook: (hook) => runHook({ ...unit, terms: (own) => unit.terms([...added, ...own]) }, hook),
      onSignal: () => {},
      onOpenLong: ({ lastStatement }, ms, warnAfter) => {
        const error = new SessionOpenLongError(warnAfter, unit.request && routeOf(unit.request), ms, lastStatement, face.firstUseOf(scope));
        unit.report(error);
        return error;
      },
      onInterrupt: (reason) => {
        onInterrupt(reason);
        scope.fail(reason, texts.interrupted).catch(() => {});
      },
      onReleased: (transaction) => openSessions?.leave(transaction),
      onCheckpoint: () => {},
      onError: (error) => unit.report(error),
    }),
  );
  face.dress(scope);
  if (unit.isFirstUseNoted) face.noteFirstUse(scope);

  let result: T;
  try {
    const running = runUnitInContext({ knex: unit.knex, isChosen: unit.isChosen ?? false, session: scope.face }, () => work(scope.face));
    result = await Promise.race([running, interrupted]);
  } catch (error) {
    await scope.fail(error, texts.failed).catch(() => {});
    throw error;
  }
  await scope.settle('commit', texts.ended);
  return result;
}

/** Runs a hook in a unit of work of its own. Never rejects. */
export async function runHook(unit: Omit<UnitOfWork, 'texts'>, hook: (session: Session) => unknown): Promise<void> {
  try {
    await runUnitOfWork({ ...unit, texts: HOOK }, async (session) => hook(session));
  } catch (error) {
    unit.report(error);
  }
}

const HOOK = {
  interrupted: 'its hook was open for too long, and its work was rolled back. See `cause`.',
  failed: 'its hook has failed, and was rolled back.',
  ended: 'its hook has ended. Await every statement before the hook returns.',
};
