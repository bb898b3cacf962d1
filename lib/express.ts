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
