import type { Request, Response } from 'express';

/** When the session is settled: see {@link SessionOptions.commitAt}. */
export type CommitAt = 'head' | 'end' | 'finish';

/** A value for all requests, or a function that gives it for one; asked at the session's first statement. */
export type PerRequest<T> = T | ((req: Request) => T);

export interface SessionOptions {
  /**
   * The property of the request where the session is attached.
   *
   * @default 'session'
   * @example sessionMiddleware(knex, { property: 'db' }) // next to express-session, which owns req.session
   */
  property?: string | undefined;

  /**
   * When the transaction is committed or rolled back.
   *
   * 1. `'head'`: before the first byte of the response leaves. A COMMIT that fails becomes a proper error response.
   * 2. `'end'`: bytes flow while the transaction is open; what completes the response is withheld until COMMIT succeeded.
   *    If it fails after bytes have left, the connection is reset.
   * 3. `'finish'`: after the response has been sent. A failing COMMIT goes to `onError`; **the client has been told otherwise.**
   *
   * @default 'head'
   * @example sessionMiddleware(knex, { commitAt: (req) => (req.path.startsWith('/export') ? 'end' : 'head') })
   */
  commitAt?: PerRequest<CommitAt> | undefined;

  /**
   * Whether the response that is about to leave means COMMIT (`true`) or ROLLBACK (`false`).
   * Asked once, when the status is fixed. It must answer at once; if it throws, the session is rolled back and the error goes to the error handlers.
   *
   * @default (req, res) => res.statusCode < 400
   * @example sessionMiddleware(knex, { shouldCommit: (req, res) => res.statusCode < 400 || res.statusCode === 422 })
   */
  shouldCommit?: ((req: Request, res: Response) => boolean) | undefined;

  /**
   * Receives the errors that no one else can: a ROLLBACK that failed, a COMMIT that failed after the response was under way.
   *
   * @default the logger of the Knex instance
   * @example sessionMiddleware(knex, { onError: (error, req) => log.error({ error, url: req?.originalUrl }) })
   */
  onError?: ((error: unknown, req?: Request) => void) | undefined;
}

interface Definition {
  readonly default: unknown;
  readonly isValid: (value: unknown) => boolean;
  /** Completes "Expected `name` to be ...". */
  readonly expected: string;
  /** Whether a function stands for the value of one request. */
  readonly perRequest: boolean;
}

const isFunction = (value: unknown): boolean => typeof value === 'function';

/** The one place that lists the options and their defaults; the README's table is checked against it. */
export const optionDefinitions = {
  property: {
    default: 'session',
    isValid: (value) => typeof value === 'string' && value !== '',
    expected: 'a non-empty string',
    perRequest: false,
  },
  commitAt: {
    default: 'head',
    isValid: (value) => value === 'head' || value === 'end' || value === 'finish',
    expected: "'head', 'end' or 'finish'",
    perRequest: true,
  },
  shouldCommit: {
    default: (_req: Request, res: Response): boolean => res.statusCode < 400,
    isValid: isFunction,
    expected: 'a function (req, res) => boolean',
    perRequest: false,
  },
  onError: { default: undefined, isValid: isFunction, expected: 'a function (error, req) => void', perRequest: false },
} as const satisfies Record<keyof SessionOptions, Definition>;

export type ResolvedOptions = Pick<SessionOptions, 'onError'> & {
  [Name in Exclude<keyof SessionOptions, 'onError'>]-?: NonNullable<SessionOptions[Name]>;
};

/**
 * Checks options when the middleware is made, so that a mistake is seen at start-up, and fills in the defaults.
 *
 * @throws TypeError for an unknown name or a value of the wrong type
 */
export function resolveOptions(
  options: SessionOptions | undefined,
  { of, known = Object.keys(optionDefinitions) }: { of: string; known?: readonly string[] },
): ResolvedOptions {
  if (options !== undefined && (typeof options !== 'object' || options === null || Symbol.iterator in options)) {
    throw new TypeError(`Expected options to be an object such as { onError: (error) => ... }, got ${describe(options)}.`);
  }
  const resolved: Record<string, unknown> = {};
  for (const [name, definition] of Object.entries(optionDefinitions)) resolved[name] = definition.default;
  for (const [name, value] of Object.entries(options ?? {})) {
    if (!known.includes(name)) throw unknownOption(name, of, known);
    if (value === undefined) continue;
    const definition: Definition = optionDefinitions[name as keyof typeof optionDefinitions];
    if (!(definition.perRequest && isFunction(value))) assertValue(name, definition, value);
    resolved[name] = value;
  }
  return resolved as unknown as ResolvedOptions;
}

/**
 * The value of an option for one request.
 *
 * @throws TypeError if the option's function returned something that is not a value of it
 */
export function valueFor<T>(name: keyof typeof optionDefinitions, option: PerRequest<T>, req: Request): T {
  if (typeof option !== 'function') return option;
  const value = (option as (req: Request) => T)(req);
  assertValue(name, optionDefinitions[name], value, ' to return');
  return value;
}

/** Whether two middlewares were made with the same options, so that one may stand for the other. */
export function sameOptions(one: ResolvedOptions, other: ResolvedOptions): boolean {
  return (Object.keys(optionDefinitions) as (keyof ResolvedOptions)[]).every((name) => one[name] === other[name]);
}

/** Names a value in an error message, without showing what is in it. */
export function describe(value: unknown): string {
  if (value === null || value === undefined) return String(value);
  if (typeof value === 'string') return `'${value}'`;
  if (typeof value === 'function') return value.name ? `a function (${value.name})` : 'a function';
  if (typeof value === 'object') return value.constructor?.name ?? 'an object';
  return String(value);
}

function assertValue(name: string, definition: Definition, value: unknown, verb = ' to be'): void {
  if (definition.isValid(value)) return;
  throw new TypeError(`Expected \`${name}\`${verb} ${definition.expected}, got ${describe(value)}.${mustBeSync(value)}`);
}

/** Completes a message about what a function of the application returned. */
export function mustBeSync(value: unknown): string {
  if (!(value instanceof Promise)) return '';
  value.catch(() => {});
  return ' It must answer at once.';
}

function unknownOption(name: string, of: string, known: readonly string[]): TypeError {
  const meant = known.find((candidate) => candidate.toLowerCase() === name.toLowerCase());
  const hint = meant ? `Did you mean \`${meant}\`?` : `${of} takes: ${known.join(', ')}.`;
  return new TypeError(`Unknown option \`${name}\`. ${hint}`);
}
