import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { root } from './typescript';

export interface Documented {
  /** 'sessionMiddleware', or 'Session.checkpoint'. */
  name: string;
  kind: 'function' | 'const' | 'class' | 'interface' | 'type' | 'method' | 'property';
  /** The doc comment without its marks; of overloads all that there are. */
  doc: string;
  /** What it is written in. */
  source: string;
}

const lib = join(root, 'lib');
const sources = readdirSync(lib)
  .filter((file) => file.endsWith('.ts'))
  .map((file) => readFileSync(join(lib, file), 'utf8'));

/** What the package's entries export, and the members of its interfaces. */
export const documented: readonly Documented[] = ['index.ts', 'testing.ts', 'opentelemetry.ts'].flatMap(documentedIn);

/** The types that `express-knex-session` exports and that take no parameters. */
export const plainTypes: readonly string[] = documentedIn('index.ts')
  .filter(({ name, kind, source }) => (kind === 'interface' || kind === 'type') && !source.includes(`${kind} ${name}<`))
  .map(({ name }) => name);

/** The examples of a doc comment, as files of their own. */
export function examplesOf({ doc }: Documented): string[] {
  return [...doc.matchAll(/^@example\s([\s\S]*?)(?=^@\w|$(?![\s\S]))/gm)].map(([, code = '']) => {
    const isModule = /^(import|export|declare) /m.test(code);
    return isModule ? `${code}\nexport {};\n` : `export async function example() {\n${code}\n}\n`;
  });
}

function documentedIn(entry: string): Documented[] {
  return namesExportedBy(readFileSync(join(lib, entry), 'utf8')).flatMap(withMembers);
}

function namesExportedBy(entry: string): string[] {
  const lists = [...entry.matchAll(/^export (?:type )?\{([^}]*)\}/gm)].flatMap(([, names = '']) => names.split(','));
  const own = [...entry.matchAll(/^export (?:interface|function) (\w+)/gm)].map(([, name = '']) => name);
  return [...lists.map((name) => name.trim().replace(/^type /, '')), ...own].filter((name) => name !== '');
}

function withMembers(name: string): Documented[] {
  const pattern = new RegExp(`^export (?:async )?(function|class|interface|type|const) ${name}\\b`, 'm');
  const source = sources.find((text) => pattern.test(text));
  const match = source && pattern.exec(source);
  if (!source || !match) throw new Error(`${name} is exported, and was not found.`);
  const kind = match[1] as Documented['kind'];
  const whole: Documented = { name, kind, doc: docBefore(source, match.index), source };
  if (kind !== 'interface') return [whole];
  const body = source.slice(match.index, source.indexOf('\n}', match.index));
  const members = new Map<string, Documented>();
  for (const { 1: member = '', 2: next, index } of body.matchAll(/^ {2}(?:readonly )?(\w+)([?:(<])/gm)) {
    const path = `${name}.${member}`;
    const doc = docBefore(body, index);
    const known = members.get(path);
    if (known) known.doc += `\n${doc}`;
    else members.set(path, { name: path, kind: next === '(' || next === '<' ? 'method' : 'property', doc, source });
  }
  return [whole, ...members.values()];
}

function docBefore(text: string, index: number): string {
  const before = text.slice(0, index).replace(/(\s*\/\/ biome-ignore .*)?\s*$/, '');
  if (!before.endsWith('*/')) return '';
  return before
    .slice(before.lastIndexOf('/**') + 3, -2)
    .split('\n')
    .map((line) => line.replace(/^\s*\* ?/, '').trimEnd())
    .join('\n')
    .trim()
    .replace(/ (@default .*)$/, '\n$1');
}
