import type { Request, Response } from 'express';
import { type Beginning, beginningOf, ISOLATION_LEVELS, type IsolationLevel, settingPairs, type TransactionModes } from './beginning';
import { describe, mustBeSync } from './describe';
import { SessionError } from './errors';
import type { Limits, PerRequest, SessionOptions } from './options';

/** What the options say of one request, once. */
export interface FixedTerms extends Limits {
  readonly modes: TransactionModes;
  readonly settings: readonly [name: string, value: string][];
}

/** What holds for one transaction. */
export interface Terms extends Limits {
  readonly beginning: Beginning;
}

interface Definition {
  readonly default: unknown;
  readonly isValid: (value: unknown) => boolean;
  /** Completes "Expected `name` to be ...". */
  readonly expected: string;
  /** Whether a function stands for the value of one request. */
  readonly perRequest: boolean;
}

const isBooleanOrNone = (value: unknown): boolean => value === undefined || typeof value === 'boolean';
const isFunction = (value: unknown): boolean => typeof value === 'function';

/** Node's timers fire at once for more than this. */
const LONGEST_TIMER_MS = 2 ** 31 - 1;
/** Whether a number of milliseconds is one that a timer can wait for. */
export const isDuration = (value: unknown, from = 1): boolean => typeof value === 'number' && value >= from && value <= LONGEST_TIMER_MS;
export const aDurationFrom = (from: number): string => `a number of milliseconds from ${from} to ${LONGEST_TIMER_MS}`;

/** Shared by all copies of this package: mounted with the defaults, they have the same options. */
const SHARED = Symbol.for('express-knex-session.commitsByStatus');
const shared = globalThis as { [SHARED]?: (req: Request, res: Response) => boolean };
shared[SHARED] ??= (_req, res) => res.statusCode < 400;
const commitsByStatus = shared[SHARED];

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
    default: commitsByStatus,
    isValid: isFunction,
    expected: 'a function (req, res) => boolean',
    perRequest: false,
  },
  isolationLevel: {
    default: undefined,
    isValid: (value) => value === undefined || ISOLATION_LEVELS.includes(value as IsolationLevel),
    expected: `one of '${ISOLATION_LEVELS.join("', '")}'`,
    perRequest: true,
  },
  readOnly: { default: undefined, isValid: isBooleanOrNone, expected: 'true or false', perRequest: true },
  deferrable: { default: undefined, isValid: isBooleanOrNone, expected: 'true or false', perRequest: true },
  settings: {
    default: undefined,
    isValid: (value) => typeof value === 'object' && value !== null && !Array.isArray(value),
    expected: "an object such as { 'app.tenant': id }, or a function (req) => object",
    perRequest: true,
  },
  role: {
    default: undefined,
    isValid: (value) => typeof value === 'string' && value !== '',
    expected: 'the name of a role',
    perRequest: true,
  },
  transaction: { default: true, isValid: (value) => typeof value === 'boolean', expected: 'true or false', perRequest: true },
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
  warnAfter: {
    default: 0,
    isValid: (value) => value === 0 || isDuration(value),
    expected: `${aDurationFrom(1)}, or 0 for never`,
    perRequest: true,
  },
  context: { default: false, isValid: (value) => typeof value === 'boolean', expected: 'true or false', perRequest: false },
  onError: { default: undefined, isValid: isFunction, expected: 'a function (error, req) => void', perRequest: false },
} as const satisfies Record<keyof SessionOptions, Definition>;

/** Those without a default of ours: the server's holds, or there is none. */
type Undecided = 'onError' | 'isolationLevel' | 'readOnly' | 'deferrable' | 'settings' | 'role';

export type ResolvedOptions = Pick<SessionOptions, Undecided> & {
  [Name in Exclude<keyof SessionOptions, Undecided>]-?: NonNullable<SessionOptions[Name]>;
};

/**
 * Checks options when the middleware is made, so that a mistake is seen at start-up, and fills in the defaults.
 *
 * @throws TypeError for an unknown name or a value of the wrong type
 */
export function resolveOptions(options: SessionOptions | undefined, check: Check): ResolvedOptions {
  const resolved: Record<string, unknown> = {};
  for (const [name, definition] of Object.entries(optionDefinitions)) resolved[name] = definition.default;
  return Object.assign(resolved, checkOptions(options, check)) as unknown as ResolvedOptions;
}

interface Check {
  of: string;
  known?: readonly string[];
  hasRequest?: boolean;
}

/** The options that were given, without defaults. @throws TypeError as {@link resolveOptions} */
export function checkOptions(
  options: SessionOptions | undefined,
  { of, known = Object.keys(optionDefinitions), hasRequest = true }: Check,
): Partial<ResolvedOptions> {
  if (options !== undefined && (typeof options !== 'object' || options === null || Symbol.iterator in options)) {
    throw new TypeError(`Expected options to be an object such as { onError: (error) => ... }, got ${describe(options)}.`);
  }
  const checked: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(options ?? {})) {
    if (!known.includes(name)) throw unknownOption(name, of, known);
    if (value === undefined) continue;
    const definition: Definition = optionDefinitions[name as keyof typeof optionDefinitions];
    if (!(hasRequest && definition.perRequest && isFunction(value))) assertValue(name, definition, value);
    checked[name] = value;
  }
  return checked;
}

/**
 * The value of an option for one request.
 *
 * @throws TypeError if the option's function returned something that is not a value of it
 */
export function valueFor<T>(name: keyof typeof optionDefinitions, option: PerRequest<T>, req: Request | undefined): T {
  if (typeof option !== 'function') return option;
  const value = (option as (req: Request | undefined) => T)(req);
  assertValue(name, optionDefinitions[name], value, ' to return');
  return value;
}

/**
 * What the options say of one request.
 *
 * @param req undefined outside of a request, where no option is a function
 * @throws TypeError or SessionError (`ERR_SESSION_OPTIONS`) for what an option's function returned
 */
export function fixedFor(options: ResolvedOptions, req: Request | undefined): FixedTerms {
  return {
    acquireTimeout: valueFor('acquireTimeout', options.acquireTimeout, req),
    transactionTimeout: valueFor('transactionTimeout', options.transactionTimeout, req),
    settleTimeout: valueFor('settleTimeout', options.settleTimeout, req),
    warnAfter: valueFor('warnAfter', options.warnAfter, req),
    modes: {
      isolationLevel: valueFor('isolationLevel', options.isolationLevel, req),
      readOnly: valueFor('readOnly', options.readOnly, req),
      deferrable: valueFor('deferrable', options.deferrable, req),
    },
    // What a function returns is a value of the request, and in no message.
    settings: settingPairs(called('settings', options.settings, req), called('role', options.role, req)),
  };
}

/** Whether {@link fixedFor} asks functions, or reads an object that may change. */
export function dependsOnRequest(options: ResolvedOptions): boolean {
  return options.settings !== undefined || FIXED.some((name) => typeof options[name] === 'function');
}

const FIXED = [
  'acquireTimeout',
  'transactionTimeout',
  'settleTimeout',
  'warnAfter',
  'isolationLevel',
  'readOnly',
  'deferrable',
  'role',
] as const satisfies (keyof SessionOptions)[];

/** Under what a transaction runs. @param added settings of `session.set()` */
export function termsOf({ modes, settings, ...limits }: FixedTerms, added: readonly [string, string][]): Terms {
  return { ...limits, beginning: beginningOf(modes, added.length === 0 ? settings : withAdded(settings, added)) };
}

/** The settings of a route for a request. @throws SessionError `ERR_SESSION_OPTIONS` as {@link settingPairs} */
export function pairsOf(settings: unknown, req: Request): [name: string, value: string][] {
  return settingPairs(called('settings', settings, req));
}

function called(name: string, option: unknown, req: Request | undefined): unknown {
  if (typeof option !== 'function') return option;
  const value: unknown = option(req);
  if (value !== undefined) return value;
  throw new SessionError(
    'ERR_SESSION_OPTIONS',
    `The function \`${name}\` has returned undefined. Without its settings no statement may run.`,
  );
}

/** Later ones win, whatever the case of their names; the role stays last. */
export function withAdded(settings: readonly [string, string][], added: readonly [string, string][]): [string, string][] {
  const all = new Map<string, [string, string]>();
  for (const pair of [...settings, ...added]) all.set(pair[0].toLowerCase(), pair);
  const role = all.get('role');
  all.delete('role');
  return role === undefined ? [...all.values()] : [...all.values(), role];
}

/** Whether two middlewares were made with the same options, so that one may stand for the other. */
export function sameOptions(one: ResolvedOptions, other: ResolvedOptions): boolean {
  return (Object.keys(optionDefinitions) as (keyof ResolvedOptions)[]).every((name) => one[name] === other[name]);
}

function assertValue(name: string, definition: Definition, value: unknown, verb = ' to be'): void {
  if (definition.isValid(value)) return;
  throw new TypeError(`Expected \`${name}\`${verb} ${definition.expected}, got ${describe(value)}.${mustBeSync(value)}`);
}

function unknownOption(name: string, of: string, known: readonly string[]): TypeError {
  const meant = known.find((candidate) => candidate.toLowerCase() === name.toLowerCase());
  const hint = meant ? `Did you mean \`${meant}\`?` : `${of} takes: ${known.join(', ')}.`;
  return new TypeError(`Unknown option \`${name}\`. ${hint}`);
}
