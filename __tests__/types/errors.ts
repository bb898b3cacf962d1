import type { ErrorRequestHandler } from 'express';
import {
  CommitUnknownError,
  SessionClosedError,
  SessionError,
  type SessionErrorCode,
  SessionTimeoutError,
  SessionUnavailableError,
  TransactionAbortedError,
} from 'express-knex-session';
import type { Equal, Expect } from './equal.js';

export const errorHandler: ErrorRequestHandler = (error: unknown, _req, res, next) => {
  if (!(error instanceof SessionError)) return next(error);
  type _code = Expect<Equal<typeof error.code, SessionErrorCode>>;
  type _status = Expect<Equal<typeof error.status, number>>;
  type _cause = Expect<Equal<typeof error.cause, unknown>>;
  // @ts-expect-error: no such code
  if (error.code === 'ERR_NO_SUCH') return;
  if (error instanceof CommitUnknownError || error.code === 'ERR_COMMIT_UNKNOWN') return void res.status(error.status).end();
  res.status(error.status).json({ code: error.code, hint: hintFor(error.code) });
};

/** Each code is in the type, and a code that is forgotten here is an error. */
function hintFor(code: SessionErrorCode): string {
  switch (code) {
    case 'ERR_COMMIT_UNKNOWN':
    case 'ERR_SESSION_UNAVAILABLE':
    case 'ERR_SESSION_TIMEOUT':
      return 'Try later.';
    case 'ERR_TRANSACTION_ABORTED':
    case 'ERR_SESSION_CLOSED':
    case 'ERR_SESSION_OPEN_LONG':
    case 'ERR_SESSION_MISSING':
    case 'ERR_SAVEPOINT_OPEN':
    case 'ERR_ROLLBACK_ONLY':
    case 'ERR_TRANSACTION_CONTROL':
    case 'ERR_NOT_A_LOGIN_SESSION':
    case 'ERR_SESSION_DESTROY':
    case 'ERR_SESSION_OPTIONS':
    case 'ERR_NO_TRANSACTION':
    case 'ERR_NOT_RETRYABLE':
      return 'Tell the developers.';
    case 'ERR_TEST_NOT_RUNNING':
    case 'ERR_TEST_BLOCKED':
    case 'ERR_TEST_LEFT_OPEN':
    case 'ERR_TEST_UNSUPPORTED':
      return 'Look at the test.';
    default:
      return code satisfies never;
  }
}

export const subclasses: (new (...values: never[]) => SessionError)[] = [
  CommitUnknownError,
  SessionClosedError,
  SessionTimeoutError,
  SessionUnavailableError,
  TransactionAbortedError,
];
