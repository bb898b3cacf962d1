import type { NextFunction, Request, Response } from 'express';
import type { Session } from './session';

/**
 * Says under which property the session is typed on Express's `Request`, if it is not `session`.
 *
 * @example
 * declare module 'express-knex-session' {
 *   interface Register {
 *     property: 'db';
 *   }
 * }
 */
// biome-ignore lint/suspicious/noEmptyInterface: applications add to it.
export interface Register {}

/** The property under which requests have their session typed: that of {@link Register}, or `'session'`. */
export type PropertyName = Register extends { property: infer Name extends string } ? Name : 'session';

type SessionOfRequest = { [Name in PropertyName]: Session };

declare global {
  namespace Express {
    interface Request extends SessionOfRequest {}
  }
}

/**
 * Middleware for routes of any kind. It is generic so that handlers beside it keep the types of their own requests and responses.
 *
 * @example
 * export const readOnly: RouteMiddleware = sessionOptions({ readOnly: true });
 */
export type RouteMiddleware = <Params, ResBody, ReqBody, Query, Locals extends Record<string, any>>(
  req: Request<Params, ResBody, ReqBody, Query, Locals>,
  res: Response<ResBody, Locals>,
  next: NextFunction,
) => void;

/**
 * The same for errors.
 *
 * @example
 * export const rollsBack: RouteErrorMiddleware = sessionErrorHandler();
 */
export type RouteErrorMiddleware = <Params, ResBody, ReqBody, Query, Locals extends Record<string, any>>(
  error: unknown,
  req: Request<Params, ResBody, ReqBody, Query, Locals>,
  res: Response<ResBody, Locals>,
  next: NextFunction,
) => void;

/** A request of any route. */
export type AnyRequest = Request<any, any, any, any, any>;
export type AnyResponse = Response<any, any>;
