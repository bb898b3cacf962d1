import { AsyncLocalStorage } from 'node:async_hooks';
import type { NextFunction, Request, Response } from 'express';
import { isGone, onClose } from './disconnect';
import { cutConnection, Overrides } from './response-hold';

/** Tells what the error handlers write from what the old handler still writes; shared by all copies of this package. */
interface ErrorHandlers {
  readonly storage: AsyncLocalStorage<Response>;
  running: number;
}

const SHARED = Symbol.for('express-knex-session.errorHandlers');
const shared = globalThis as { [SHARED]?: ErrorHandlers };
shared[SHARED] ??= { storage: new AsyncLocalStorage(), running: 0 };
const errorHandlers = shared[SHARED];

/**
 * Lets the application's error handlers answer in place of a response that has been discarded.
 *
 * 1. The status is `error.status`, or 500, unless they choose another; a success (2xx) is never sent.
 * 2. What the old handler still writes is dropped, up to its `end`. A later write cannot be told from that of an error handler that has lost
 *    its context: the connection is cut.
 * 3. If the old handler has not ended, the connection is closed afterwards: its late error would hit the next request on it.
 */
export function answerWithError(
  error: unknown,
  { req, res, next, hasHandlerEnded }: { req: Request; res: Response; next: NextFunction; hasHandlerEnded: boolean },
): void {
  const status = statusOf(error);
  res.statusMessage = undefined as never;
  if (!hasHandlerEnded) res.setHeader('Connection', 'close');
  guard(res, status, hasHandlerEnded);
  // Not the middleware's own `next`: inside a nested router it would go on with the wrong URL, and skip the router's handlers.
  runErrorHandlers(res, () => (req.next ?? next)(error));
}

/** Runs error handlers so that what they write can be told from what the old handler still writes. */
export function runErrorHandlers(res: Response, call: () => void): void {
  // Nothing can be written to it any more.
  if (isGone(res.req, res)) {
    call();
    return;
  }
  errorHandlers.running++;
  // Not only the response's own 'close': one that is pipelined behind a reset never has it.
  onClose(res.req, res, () => {
    errorHandlers.running--;
    // As long as it is in use, it costs every promise of the process.
    if (errorHandlers.running === 0) errorHandlers.storage.disable();
  });
  errorHandlers.storage.run(res, call);
}

/** Whether it is an error handler that runs; not certain if it is false, since a context can be lost. */
export function isErrorHandler(res: Response): boolean {
  return errorHandlers.storage.getStore() === res;
}

function guard(res: Response, status: number, hasHandlerEnded: boolean): void {
  const overrides = new Overrides(res);
  let mayEnd = !hasHandlerEnded;

  const isForeign = (): boolean => !isErrorHandler(res);
  let current = status;
  Object.defineProperties(res, {
    // To the old handler its response has gone. Express's final handler, if a late error of it gets there, must not touch the headers.
    headersSent: {
      configurable: true,
      get: () => isForeign() || Reflect.get(Object.getPrototypeOf(res), 'headersSent', res),
    },
    statusCode: {
      configurable: true,
      enumerable: true,
      get: () => current,
      set: (value: number) => {
        if (!isForeign()) current = value;
      },
    },
  });

  const wrap = (name: string, onForeign: (...args: any[]) => unknown, beforeOwn?: (args: any[]) => void): void => {
    const original = overrides.set(name, (...args) => {
      if (isForeign()) return onForeign(...args);
      beforeOwn?.(args);
      return original.apply(res, args);
    });
  };
  const refuseHeader = (): never => {
    throw Object.assign(new Error('Cannot set headers after they are sent to the client'), {
      code: 'ERR_HTTP_HEADERS_SENT',
    });
  };
  const dropOrCut = (): void => {
    if (!mayEnd && !res.writableEnded) cutConnection(res);
  };
  for (const name of ['setHeader', 'setHeaders', 'appendHeader', 'removeHeader']) wrap(name, refuseHeader);
  // Node makes every head by it, also one that nobody has asked for.
  wrap('writeHead', refuseHeader, (args) => {
    if (isSuccess(Number(args[0]))) args[0] = status;
  });
  wrap('flushHeaders', () => {});
  wrap('write', () => {
    dropOrCut();
    // `true`: a source that is piped here flows to its end instead of waiting.
    return true;
  });
  wrap('end', () => {
    dropOrCut();
    mayEnd = false;
    return res;
  });
}

function statusOf(error: unknown): number {
  const status = (error as { status?: unknown } | null | undefined)?.status;
  return typeof status === 'number' && Number.isInteger(status) && status >= 400 && status <= 599 ? status : 500;
}

function isSuccess(status: number): boolean {
  return status >= 200 && status < 300;
}
