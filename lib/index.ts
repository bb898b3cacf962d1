/**
 * Express middleware that gives every request its own database session: a Knex transaction that begins with the first statement, and is
 * committed before the response leaves, or rolled back. The README says how it is meant to be used.
 *
 * @module express-knex-session
 */
export type { IsolationLevel, Settings } from './beginning';
export {
  CommitUnknownError,
  SessionClosedError,
  SessionError,
  type SessionErrorCode,
  SessionOpenLongError,
  SessionTimeoutError,
  SessionUnavailableError,
  TransactionAbortedError,
} from './errors';
export {
  type ConnectionDestroyedMessage,
  type LateUseMessage,
  type OpenLongMessage,
  type SessionChannel,
  type SessionChannels,
  type SessionMessage,
  type SettleReason,
  sessionChannels,
  type TransactionMessage,
} from './events';
export type { PropertyName, Register, RouteErrorMiddleware, RouteMiddleware } from './express';
export { isRetryable } from './is-retryable';
export type { SessionStats } from './open-sessions';
export type { CommitAt, OnDisconnect, PerRequest, SessionOptions } from './options';
export { type RetryableOptions, retryable } from './retryable';
export { currentSession, type ScopedSessionOptions, scopedSession } from './scoped-session';
export type { Session } from './session';
export { sessionErrorHandler } from './session-error-handler';
export { getSession, type SessionMiddleware, sessionMiddleware } from './session-middleware';
export { sessionOptions } from './session-options';
export type { Outcome } from './transaction';
export { type WithSessionOptions, withSession } from './with-session';
