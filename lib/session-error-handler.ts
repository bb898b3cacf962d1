import type { NextFunction } from 'express';
import { sessionsOf } from './attached-sessions';
import { runErrorHandlers } from './error-response';
import type { AnyRequest, AnyResponse, RouteErrorMiddleware } from './express';

/**
 * Rolls the request's sessions back before an error goes on to the error handlers mounted after it, so that whatever status
 * they answer with, nothing is stored.
 *
 * 1. Mount it after the routes, and in each router that has an error handler of its own.
 * 2. The error is passed on untouched; one of a ROLLBACK that fails goes to `onError`.
 * 3. If the response had been decided before the error, that decision stands.
 *
 * @throws TypeError at construction, for an argument: it takes none
 * @example
 * app.use(sessionMiddleware(knex));
 * app.use(routes);
 * app.use(sessionErrorHandler());
 * app.use(myErrorHandler);
 */
export function sessionErrorHandler(...none: never[]): RouteErrorMiddleware;
// Four parameters, so that Express passes the error if the function itself was mounted: it must not be skipped in silence.
export function sessionErrorHandler(mistaken?: unknown, _req?: unknown, _res?: unknown, _next?: unknown) {
  if (mistaken !== undefined) {
    throw new TypeError(
      'sessionErrorHandler takes no arguments. If you have done something like app.use(sessionErrorHandler), it should be app.use(sessionErrorHandler()).',
      { cause: mistaken },
    );
  }
  return function sessionErrorHandlerHandler(error: unknown, req: AnyRequest, res: AnyResponse, next: NextFunction): void {
    // All at once: while one is rolled back, the old handler may still send a success, and another would commit.
    const failing = sessionsOf(req, res).flatMap((session) => session.fail(error) ?? []);
    if (failing.length === 0) next(error);
    else {
      void Promise.all(failing).then((fates) => {
        if (fates.includes('decided')) next(error);
        else if (!fates.includes('passed on')) runErrorHandlers(res, () => next(error));
      });
    }
  };
}
