import type { SessionErrorCode } from './errors';
import { TRANSIENT_FAILURES } from './postgres';

/**
 * Whether the same work may succeed if it is done again from its beginning.
 *
 * 1. True after a serialization failure (40001) or a deadlock (40P01), at a statement or at COMMIT, also as the `cause` of another error.
 * 2. Never after `ERR_COMMIT_UNKNOWN`: the work may be stored.
 *
 * @example
 * const answerConflict: ErrorRequestHandler = (error, req, res, next) => {
 *   if (isRetryable(error)) res.status(409).set('Retry-After', '1').end();
 *   else next(error);
 * };
 */
export function isRetryable(error: unknown): boolean {
  const seen = new Set<unknown>();
  for (let at = error; at instanceof Error && !seen.has(at); at = at.cause ?? (at as { nativeError?: unknown }).nativeError) {
    seen.add(at);
    const { code } = at as { code?: unknown };
    if (code === UNKNOWN) return false;
    if (TRANSIENT_FAILURES.has(code)) return true;
  }
  return false;
}

const UNKNOWN: SessionErrorCode = 'ERR_COMMIT_UNKNOWN';
