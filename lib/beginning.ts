import { describe, mustBeSync } from './describe';
import { SessionError } from './errors';

/** PostgreSQL's isolation levels ("Transaction Isolation"). */
export const ISOLATION_LEVELS = ['read uncommitted', 'read committed', 'repeatable read', 'serializable'] as const;
/** An isolation level of PostgreSQL, in its own words ("Transaction Isolation"). */
export type IsolationLevel = (typeof ISOLATION_LEVELS)[number];

/** PostgreSQL's run-time settings, by name; a value is sent as text. Null and undefined are none: see {@link SessionOptions.settings}. */
export type Settings = Readonly<Record<string, string | number | boolean>>;

/** A statement that the session sends by itself. */
export interface Command {
  readonly text: string;
  readonly values?: readonly string[] | undefined;
}

export interface TransactionModes {
  readonly isolationLevel?: IsolationLevel | undefined;
  readonly readOnly?: boolean | undefined;
  readonly deferrable?: boolean | undefined;
}

/** How a transaction begins: what goes ahead of its first statement. */
export interface Beginning {
  /** BEGIN, and what puts the settings in place, if there are any. */
  readonly commands: readonly Command[];
  readonly modes: TransactionModes;
  readonly settings: readonly [name: string, value: string][];
}

/** As Knex spells it, so that listeners which look for it find it. */
export const PLAIN: Beginning = { commands: [{ text: 'BEGIN;' }], modes: {}, settings: [] };

/** Nothing goes ahead: each statement is a transaction by itself. */
export const AUTOCOMMIT: Beginning = { commands: [], modes: {}, settings: [] };

export function beginningOf(modes: TransactionModes, settings: readonly [string, string][]): Beginning {
  if (settings.length === 0 && !modes.isolationLevel && modes.readOnly === undefined && modes.deferrable === undefined) return PLAIN;
  const begin = { text: beginText(modes) };
  return { commands: settings.length === 0 ? [begin] : [begin, settingsCommand(settings)], modes, settings };
}

function beginText({ isolationLevel, readOnly, deferrable }: TransactionModes): string {
  const words = [
    isolationLevel && `ISOLATION LEVEL ${isolationLevel.toUpperCase()}`,
    readOnly !== undefined && (readOnly ? 'READ ONLY' : 'READ WRITE'),
    deferrable !== undefined && (deferrable ? 'DEFERRABLE' : 'NOT DEFERRABLE'),
  ].filter(Boolean);
  return words.length === 0 ? 'BEGIN;' : `BEGIN TRANSACTION ${words.join(' ')};`;
}

/** For this transaction only (PostgreSQL: "set_config", `is_local`). The role is a setting like others, and must come last: it may not set them. */
export function settingsCommand(settings: readonly [name: string, value: string][]): Command {
  const calls = settings.map((_, index) => `set_config($${2 * index + 1}, $${2 * index + 2}, true)`);
  return { text: `SELECT ${calls.join(', ')}`, values: settings.flat() };
}

/**
 * Settings and a role as pairs of strings.
 *
 * @throws SessionError `ERR_SESSION_OPTIONS` for what PostgreSQL would take for "no value", in silence: row-level security that depends on it
 *   would show the wrong rows
 */
export function settingPairs(settings: unknown, role?: unknown): [name: string, value: string][] {
  const pairs: [string, string][] = [];
  if (settings !== undefined) {
    // What holds its values elsewhere (a Map, Headers) would count as none.
    if (typeof settings !== 'object' || settings === null || Symbol.iterator in settings || settings instanceof Promise) {
      throw wrong(`Expected \`settings\` to be an object such as { 'app.tenant': id }, got ${kindOf(settings)}.${mustBeSync(settings)}`);
    }
    for (const [name, value] of Object.entries(settings)) {
      if (name === '') throw wrong('A name in `settings` is empty.');
      if (!['string', 'number', 'boolean'].includes(typeof value) || (typeof value === 'number' && !Number.isFinite(value))) {
        throw wrong(
          `Expected the value of '${name}' in \`settings\` to be a string, a number or a boolean, got ${kindOf(value)}.${mustBeSync(value)}`,
        );
      }
      pairs.push([name, String(value)]);
    }
  }
  if (role !== undefined) {
    if (typeof role !== 'string' || role === '')
      throw wrong(`Expected \`role\` to be the name of a role, got ${kindOf(role)}.${mustBeSync(role)}`);
    pairs.push(['role', role]);
  }
  return pairs;
}

/** What `session.set()` is given. @throws SessionError as {@link settingPairs} */
export function settingsToSet(settings: unknown): [name: string, value: string][] {
  return settingPairs(settings ?? null);
}

/** Without showing a value. */
function kindOf(value: unknown): string {
  if (value === '') return 'an empty string';
  if (typeof value === 'number') return Number.isFinite(value) ? 'a number' : String(value);
  return typeof value === 'string' ? 'a string' : describe(value);
}

function wrong(message: string): SessionError {
  return new SessionError('ERR_SESSION_OPTIONS', message);
}
