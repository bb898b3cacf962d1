import type { NextFunction } from 'express';
import { sessionsOf } from './attached-sessions';
import { SessionError } from './errors';
import type { AnyRequest, AnyResponse, RouteMiddleware } from './express';
import type { SessionOptions } from './options';
import type { RequestSession } from './request-session';
import { checkOptions } from './resolve-options';

/**
 * Route middleware that changes the options of this request's session, before its first statement.
 *
 * 1. Options that are not named stay as they are.
 * 2. With sessions on several properties, `property` says which one is meant; it cannot be changed.
 *
 * @throws TypeError at construction, for an option that is not what it should be
 * @throws SessionError to the error handlers: `ERR_SESSION_OPTIONS` if a statement has run before, `ERR_SESSION_MISSING` without a session
 * @example
 * app.get('/report', sessionOptions({ isolationLevel: 'repeatable read', readOnly: true }), async (req, res) => {
 *   res.json(await report(req.session));
 * });
 */
export function sessionOptions(options: SessionOptions): RouteMiddleware {
  if (options === undefined || typeof options === 'function') {
    throw new TypeError('Expected options such as { readOnly: true }. It should be app.get(path, sessionOptions({ ... }), handler).');
  }
  const { property, ...changes } = checkOptions(options, { of: 'sessionOptions()' });
  return function sessionOptionsHandler(req: AnyRequest, res: AnyResponse, next: NextFunction): void {
    try {
      meant(sessionsOf(req, res), property).changeOptions(changes);
    } catch (error) {
      next(error);
      return;
    }
    next();
  };
}

function meant(sessions: RequestSession[], property: string | undefined): RequestSession {
  const candidates = property === undefined ? sessions : sessions.filter(({ mount }) => mount.options.property === property);
  if (candidates.length === 1) return candidates[0] as RequestSession;
  if (candidates.length === 0) {
    throw new SessionError(
      'ERR_SESSION_MISSING',
      'sessionOptions() has found no session. Mount app.use(sessionMiddleware(knex)) before this route.',
    );
  }
  const names = candidates.map(({ mount }) => `'${mount.options.property}'`).join(' or ');
  throw new SessionError(
    'ERR_SESSION_OPTIONS',
    `The request has several sessions. Say which one is meant: sessionOptions({ property: ${names}, ... }).`,
  );
}
