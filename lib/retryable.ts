import type { NextFunction, Request, RequestHandler, Response } from 'express';
import { Attempt } from './attempt';
import { describe } from './describe';
import { SessionError } from './errors';

/** The options of {@link retryable}. */
export interface RetryableOptions {
  /**
   * How often the handler may run, the first time included.
   *
   * @default 3
   * @example retryable(handler, { attempts: 5 })
   */
  attempts?: number | undefined;
}

/**
 * Runs a route handler again, with a new session, after a serialization failure (40001) or a deadlock (40P01), at a statement or at COMMIT.
 *
 * 1. What the failed attempt has prepared is gone: its statements, status, headers, cookies and hooks. What it still does is refused
 *    (`ERR_SESSION_CLOSED`) or dropped. Between two attempts there is a short pause, of random length, without a connection.
 * 2. The handler gets a `req` of its own for each attempt, with a session of its own; `req.body` and what came before it are the same objects.
 * 3. Never after an outcome that nobody knows, a byte that has left, `commit()`, `checkpoint()` or `next()`; nor if the session was used
 *    before the handler. The error goes to the error handlers then, as it does after the last attempt.
 * 4. A body that nobody has read yet is refused (`ERR_NOT_RETRYABLE`): there is none for a second attempt. Parse it before.
 *
 * @throws TypeError at construction, for an argument that is not what it should be
 * @example
 * app.post('/transfers', sessionOptions({ isolationLevel: 'serializable' }), retryable(async (req, res) => {
 *   await transfer(req.session, req.body);
 *   res.status(201).end();
 * }));
 */
export function retryable<Handler extends RequestHandler<any, any, any, any, any>>(
  handler: Handler,
  options: RetryableOptions = {},
): Handler {
  if (typeof handler !== 'function' || handler.length > 3) {
    throw new TypeError(`Expected \`handler\` to be a function (req, res, next) => ..., got ${describe(handler)}.`);
  }
  if (typeof options !== 'object' || options === null || Symbol.iterator in options) {
    throw new TypeError(`Expected options to be an object such as { attempts: 5 }, got ${describe(options)}.`);
  }
  const { attempts = 3, ...others } = options;
  for (const name of Object.keys(others)) throw new TypeError(`Unknown option \`${name}\`. retryable() takes: attempts.`);
  if (!Number.isInteger(attempts) || attempts < 1)
    throw new TypeError(`Expected \`attempts\` to be a whole number from 1, got ${describe(attempts)}.`);

  function retryableHandler(req: Request, res: Response, next: NextFunction): void {
    if (isUnread(req)) next(new SessionError('ERR_NOT_RETRYABLE', BODY_IS_UNREAD));
    else Attempt.first({ handler, attempts, req, res, next });
  }
  return retryableHandler as unknown as Handler;
}

function isUnread(req: Request): boolean {
  const { 'content-length': length, 'transfer-encoding': encoding } = req.headers;
  return !req.readableEnded && (Number(length) > 0 || encoding !== undefined);
}

const BODY_IS_UNREAD =
  "retryable(): the request's body has not been read, and could be read in one attempt only. Mount a parser before it, such as express.json().";
