export {
  CommitUnknownError,
  SessionClosedError,
  SessionError,
  type SessionErrorCode,
  SessionUnavailableError,
  TransactionAbortedError,
} from './errors';
export type { PropertyName, Register } from './express';
export type { CommitAt, PerRequest, SessionOptions } from './options';
export type { Session } from './session';
export { sessionErrorHandler } from './session-error-handler';
export { getSession, sessionMiddleware } from './session-middleware';
export type { Outcome } from './transaction';
export { type WithSessionOptions, withSession } from './with-session';
