import type { Request, Response } from 'express';

/** When the session is settled: see {@link SessionOptions.commitAt}. */
export type CommitAt = 'head' | 'end' | 'finish';

/** What becomes of the work when its client has gone: see {@link SessionOptions.onDisconnect}. */
export type OnDisconnect = 'rollback' | 'finish';

/** How long a session waits for what, in ms. */
export interface Limits {
  readonly acquireTimeout: number;
  readonly transactionTimeout: number;
  readonly settleTimeout: number;
}

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
   * What a client that disconnects before the response ends means for the work: it is cancelled and rolled back, or the handler goes on
   * and its response decides as always.
   *
   * @default 'rollback'
   * @example sessionMiddleware(knex, { onDisconnect: (req) => (req.method === 'GET' ? 'rollback' : 'finish') })
   */
  onDisconnect?: PerRequest<OnDisconnect> | undefined;

  /**
   * How long the first statement may wait for a connection, in ms. Past it: `ERR_SESSION_UNAVAILABLE` (503).
   *
   * @default 5000
   * @example sessionMiddleware(knex, { acquireTimeout: 1_000 })
   */
  acquireTimeout?: PerRequest<number> | undefined;

  /**
   * How long a transaction may stay open, in ms, from the moment it has a connection; 0 is no limit. A stream of rows that moves extends it.
   * Past it the running statement is cancelled, the work is rolled back, and the client gets `ERR_SESSION_TIMEOUT` (503) if nothing was sent yet.
   *
   * @default 30000
   * @example sessionMiddleware(knex, { transactionTimeout: (req) => (req.path.startsWith('/reports') ? 300_000 : 10_000) })
   */
  transactionTimeout?: PerRequest<number> | undefined;

  /**
   * How long COMMIT or ROLLBACK may take, in ms. Past it the connection is destroyed; a COMMIT without an answer is `ERR_COMMIT_UNKNOWN`.
   *
   * @default 10000
   * @example sessionMiddleware(knex, { settleTimeout: 5_000 })
   */
  settleTimeout?: PerRequest<number> | undefined;

  /**
   * Receives the errors that no one else can: a ROLLBACK that failed (its `cause` is the error that it was for), a COMMIT that failed
   * after the response was under way.
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

/** Node's timers fire at once for more than this. */
const LONGEST_TIMER_MS = 2 ** 31 - 1;
/** Whether a number of milliseconds is one that a timer can wait for. */
export const isDuration = (value: unknown, from = 1): boolean => typeof value === 'number' && value >= from && value <= LONGEST_TIMER_MS;
export const aDurationFrom = (from: number): string => `a number of milliseconds from ${from} to ${LONGEST_TIMER_MS}`;

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
  onDisconnect: {
    default: 'rollback',
    isValid: (value) => value === 'rollback' || value === 'finish',
    expected: "'rollback' or 'finish'",
    perRequest: true,
  },
  acquireTimeout: { default: 5_000, isValid: (value) => isDuration(value), expected: aDurationFrom(1), perRequest: true },
  transactionTimeout: {
    default: 30_000,
    isValid: (value) => value === 0 || isDuration(value),
    expected: `${aDurationFrom(1)}, or 0 for no limit`,
    perRequest: true,
  },
  settleTimeout: { default: 10_000, isValid: (value) => isDuration(value), expected: aDurationFrom(1), perRequest: true },
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
  { of, known = Object.keys(optionDefinitions), hasRequest = true }: { of: string; known?: readonly string[]; hasRequest?: boolean },
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
    if (!(hasRequest && definition.perRequest && isFunction(value))) assertValue(name, definition, value);
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

export function limitsFor(options: ResolvedOptions, req: Request): Limits {
  return {
    acquireTimeout: valueFor('acquireTimeout', options.acquireTimeout, req),
    transactionTimeout: valueFor('transactionTimeout', options.transactionTimeout, req),
    settleTimeout: valueFor('settleTimeout', options.settleTimeout, req),
  };
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
