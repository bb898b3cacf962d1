import type { Request } from 'express';

/** Names a value in an error message, without showing what is in it. */
export function describe(value: unknown): string {
  if (value === null || value === undefined) return String(value);
  if (typeof value === 'string') return `'${value}'`;
  if (typeof value === 'function') return value.name ? `a function (${value.name})` : 'a function';
  if (typeof value === 'object') return value.constructor?.name ?? 'an object';
  return String(value);
}

/** Completes a message about what a function of the application returned. */
export function mustBeSync(value: unknown): string {
  if (!(value instanceof Promise)) return '';
  value.catch(() => {});
  return ' It must answer at once.';
}

/** The method and the path of a request's route, or of the request where it has none. */
export function routeOf(req: Request): string {
  return `${req.method} ${req.baseUrl}${req.route?.path ?? req.path}`;
}
