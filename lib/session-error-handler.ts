import type { ErrorRequestHandler, NextFunction, Request, Response } from 'express';
import { RequestSession } from './request-session';

/**
 * Rolls the request's sessions back before an error goes on to the error handlers mounted after it, so that whatever status
 * they answer with, nothing is stored.
 *
 * 1. Mount it after the routes, and in each router that has an error handler of its own.
 * 2. The error is passed on untouched; one of a ROLLBACK that fails goes to `onError`.
 * 3. If the response had been decided before the error, that decision stands.
 *
 * @example
 * app.use(sessionMiddleware(knex));
 * app.use(routes);
 * app.use(sessionErrorHandler());
 * app.use(myErrorHandler);
 */
export function sessionErrorHandler(...none: never[]): ErrorRequestHandler;
// Four parameters, so that Express passes the error if the function itself was mounted: it must not be skipped in silence.
export function sessionErrorHandler(mistaken?: unknown, _req?: unknown, _res?: unknown, _next?: unknown) {
  if (mistaken !== undefined) {
    throw new TypeError(
      'sessionErrorHandler takes no arguments. If you have done something like app.use(sessionErrorHandler), it should be app.use(sessionErrorHandler()).',
      { cause: mistaken },
    );
  }
  return async function sessionErrorHandlerHandler(error: unknown, req: Request, _res: Response, next: NextFunction): Promise<void> {
    for (const session of RequestSession.of(req)) await session.fail(error);
    next(error);
  };
}
