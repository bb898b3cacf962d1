import type { IsolationLevel } from '../beginning';
import { controlsTransaction } from '../postgres';

/** What BEGIN or SET TRANSACTION asks for. */
export interface TransactionModes {
  isolationLevel?: IsolationLevel | undefined;
  readOnly?: boolean | undefined;
}

export type Control =
  | { kind: 'begin' | 'set'; modes: TransactionModes }
  | { kind: 'commit' | 'rollback' }
  /** Several statements in one text, or a form that has no counterpart inside of a transaction. */
  | { kind: 'unsupported' };

const COMMAND =
  /^\s*(?:(begin(?:\s+(?:work|transaction))?|start\s+transaction|set\s+transaction(?!\s+snapshot))([^;]*)|(commit|end|rollback|abort)(?:\s+(?:work|transaction))?)\s*;?\s*$/i;

/** What a text means for the transaction that it runs in; undefined for an ordinary statement. */
export function controlOf(text: string): Control | undefined {
  const [, opening, modes = '', ending] = COMMAND.exec(text) ?? [];
  if (opening) return { kind: /^set/i.test(opening) ? 'set' : 'begin', modes: modesOf(modes) };
  if (ending) return { kind: /^(?:commit|end)/i.test(ending) ? 'commit' : 'rollback' };
  return controlsTransaction(text) ? { kind: 'unsupported' } : undefined;
}

function modesOf(text: string): TransactionModes {
  const level = /isolation\s+level\s+(read\s+uncommitted|read\s+committed|repeatable\s+read|serializable)/i.exec(text)?.[1];
  const access = /\bread\s+(only|write)\b/i.exec(text)?.[1];
  return {
    isolationLevel: level?.toLowerCase().replace(/\s+/, ' ') as IsolationLevel | undefined,
    readOnly: access === undefined ? undefined : access.toLowerCase() === 'only',
  };
}

/** The run-time settings that a statement sets up to the end of its transaction, as far as its text tells. */
export function localSettingsIn(text: string, values: readonly unknown[] = []): string[] {
  if (!/\bset/i.test(text)) return [];
  const names: unknown[] = [];
  for (const [, quoted, position] of text.replace(COMMENT, ' ').matchAll(/\bset_config\s*\(\s*(?:'((?:[^']|'')+)'|\$(\d+))/gi)) {
    names.push(quoted?.replaceAll("''", "'") ?? values[Number(position) - 1]);
  }
  for (const [, name = ''] of text
    .replace(STRING_OR_COMMENT, ' ')
    .replaceAll('"', '')
    .matchAll(/\bset\s+local\s+(time\s+zone|session\s+authorization|[\w.]+)/gi)) {
    names.push(SPELLINGS[name.toLowerCase().replace(/\s+/, ' ')] ?? name);
  }
  // RELEASE puts the modes of a transaction back by itself.
  return names.filter((name) => typeof name === 'string').filter((name) => !/^transaction/i.test(name));
}

const COMMENT = /--[^\n]*|\/\*.*?\*\//gs;
const STRING_OR_COMMENT = /'(?:[^']|'')*'|\$(\w*)\$.*?\$\1\$|--[^\n]*|\/\*.*?\*\//gs;
const SPELLINGS: Record<string, string> = {
  'time zone': 'timezone',
  'session authorization': 'session_authorization',
  schema: 'search_path',
  names: 'client_encoding',
};
