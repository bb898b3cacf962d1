import type { Request } from 'express';
import type { Knex } from 'knex';
import { assertKnex } from './assert-knex';
import { sessionsOn } from './attached-sessions';
import { requestInContext, type Unit, unitInContext, useContext } from './context';
import { describe } from './describe';
import { SessionError } from './errors';
import { KnexFace, scopeOf } from './knex-face';
import type { RequestSession } from './request-session';
import { scopedFace } from './scoped-face';
import type { Session } from './session';

/** The options of {@link scopedSession}. */
export interface ScopedSessionOptions {
  /**
   * What a statement outside of a request means: it is refused (`ERR_SESSION_MISSING`), or it commits by itself, on the pool.
   *
   * @default 'throw'
   * @example scopedSession(knex, { outside: 'autocommit' }) // scripts and jobs use the same module
   */
  outside?: 'throw' | 'autocommit' | undefined;
}

/**
 * The session of the running request, from any depth: for code that is not handed a request.
 *
 * 1. The middleware needs `{ context: true }`.
 * 2. In `withSession()` and in hooks it is theirs.
 *
 * @param property where the middleware attached it; needed if the request has several
 * @default the only one, or that on `req.session`
 * @throws SessionError `ERR_SESSION_MISSING` outside of a request, or if there is no such session
 * @example
 * async function audit(action: string) {
 *   await currentSession()('audit').insert({ action });
 * }
 */
export function currentSession(property?: string): Session {
  if (property === undefined) for (const { session } of unitsInContext()) return session;
  const req = requestInContext();
  if (!req) throw missing('currentSession()');
  const sessions = sessionsOf(req).filter(({ mount }) => property === undefined || mount.options.property === property);
  const session = sessions.length === 1 ? sessions[0] : sessions.find(({ mount }) => mount.options.property === 'session');
  if (!session) throw missing(property === undefined ? 'currentSession()' : `currentSession('${property}')`);
  return session.opened.scope.face;
}

/**
 * A Knex-shaped object that always means the running request's session: for existing code that imports one `db`.
 *
 * 1. It is made once, where `knex` was exported; the middleware is given the Knex instance itself, and `{ context: true }`.
 * 2. A query is run by the request in which it is awaited, wherever it was built. `transaction()` is a savepoint in the session.
 * 3. In `withSession()` and in hooks it means their session. Outside of all of these it throws, and never falls back to the pool unless it was asked to.
 * 4. `destroy()` outside of a request destroys the pool of `knex`.
 *
 * @throws TypeError for an argument that is not what it should be
 * @example
 * // db.js
 * export const knex = createKnex(config);
 * export const db = scopedSession(knex);
 * // app.js
 * app.use(sessionMiddleware(knex, { context: true }));
 */
export function scopedSession(knex: Knex, options: ScopedSessionOptions = {}): Knex {
  assertKnex(knex);
  useContext();
  const { outside = 'throw', ...others } = options;
  for (const name of Object.keys(others)) throw new TypeError(`Unknown option \`${name}\`. scopedSession() takes: outside.`);
  if (outside !== 'throw' && outside !== 'autocommit') {
    throw new TypeError(`Expected \`outside\` to be 'throw' or 'autocommit', got ${describe(outside)}.`);
  }
  const sessions = (): RequestSession[] => {
    const req = requestInContext();
    return req ? sessionsOf(req) : [];
  };
  const current = () => {
    const units = [...unitsInContext()];
    const unit = units.find((unit) => unit.knex === knex) ?? units.find(({ isChosen }) => isChosen);
    if (unit) return scopeOf(unit.session);
    const candidates = sessions();
    if (candidates.length > 0) return sessionOn(knex, candidates);
    if (outside === 'autocommit') return undefined;
    throw missing('scopedSession()');
  };
  return scopedFace(knex, KnexFace.of(knex), { current, isInRequest: () => sessions().length > 0 });
}

/** From the innermost. What goes on after the end of its savepoint belongs to the level above. */
function* unitsInContext(): Generator<Unit> {
  for (let unit = unitInContext(); unit; unit = unit.outer) if (!scopeOf(unit.session).isOver) yield unit;
}

/** One that was chosen for the request is meant, whichever Knex it is on. */
function sessionOn(knex: Knex, sessions: RequestSession[]) {
  const session = sessions.find(({ mount }) => mount.knex === knex) ?? sessions.find(({ mount }) => mount.choose);
  if (session) return session.opened.scope;
  throw new SessionError(
    'ERR_SESSION_MISSING',
    'scopedSession(knex): the request has no session on this Knex instance. Mount app.use(sessionMiddleware(knex, { context: true })) with the same one.',
  );
}

/** Outside of production all are in context; what works there must work in production. */
function sessionsOf(req: Request): RequestSession[] {
  return sessionsOn(req).filter(({ mount }) => mount.options.context);
}

function missing(what: string): SessionError {
  return new SessionError(
    'ERR_SESSION_MISSING',
    `${what}: no request is running here that has such a session. Mount app.use(sessionMiddleware(knex, { context: true })) before the routes; ` +
      'for work outside of requests, use withSession().',
  );
}
