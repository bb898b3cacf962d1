import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, normalize } from 'node:path';
import { root } from './typescript';

export interface Example {
  /** The page, by its path from the root. */
  page: string;
  /** The text of the heading of the second level above it, or that of the page. */
  section: string;
  /** As it is marked: 'ts', 'js', 'sh' ... */
  language: string;
  code: string;
}

const FOLDERS_OF_OTHERS = ['node_modules', 'dist', 'coverage'];

/** The Markdown files of the repository, by their paths, without those that are made of doc comments. */
export const pages: ReadonlyMap<string, string> = new Map(
  markdownIn('')
    .filter((path) => !path.startsWith('docs/api/'))
    .sort()
    .map((path) => [path, readFileSync(join(root, path), 'utf8')]),
);

export const readme = pageOf('README.md');

/** The headings of the README's chapters. */
export const headings = headingsOf('README.md', 2);

/** All blocks of code, page by page, in order. */
export const examples: readonly Example[] = [...pages].flatMap(([page, text]) =>
  text.split(/^## /m).flatMap((part) => {
    const section = part.slice(0, part.indexOf('\n')).replace(/^# /, '');
    return [...part.matchAll(/^```(\w*)\n([\s\S]*?)^```$/gm)].map(([, language = '', code = '']) => ({ page, section, language, code }));
  }),
);

export function pageOf(path: string): string {
  const text = pages.get(path);
  if (text === undefined) throw new Error(`There is no page ${path}.`);
  return text;
}

/** The headings of a page that are of this level, or of any. */
export function headingsOf(page: string, level?: number): string[] {
  const mark = level === undefined ? '#+' : '#'.repeat(level);
  const withoutCode = pageOf(page).replace(/^```[\s\S]*?^```/gm, '');
  return [...withoutCode.matchAll(new RegExp(`^${mark} (.+)$`, 'gm'))].map(([, heading]) => heading as string);
}

/** The text of a chapter of the README. */
export function sectionOf(heading: string, page = 'README.md'): string {
  const text = pageOf(page)
    .split(/^## /m)
    .find((text) => text.startsWith(`${heading}\n`));
  if (text === undefined) throw new Error(`${page} has no section ${heading}.`);
  return text;
}

/** The rows of the first table of a text, its head left out. */
export function tableIn(text: string): string[][] {
  const lines = text.split('\n');
  const first = lines.findIndex((line) => line.startsWith('|'));
  const end = lines.findIndex((line, index) => index > first && !line.startsWith('|'));
  return lines.slice(first + 2, end === -1 ? undefined : end).map((row) =>
    row
      .slice(1, -1)
      .split(' | ')
      .map((cell) => cell.trim()),
  );
}

/** The example of a chapter of the README that has this text in it. */
export function exampleOf(section: string, text = ''): string {
  return found(({ page, ...example }) => page === 'README.md' && example.section === section, text, `the README's ${section}`);
}

/** The example of another page, 'recipes/replicas' for one, that has this text in it. */
export function exampleIn(page: string, text = '', language = 'ts'): string {
  pageOf(`docs/${page}.md`);
  return found((example) => example.page === `docs/${page}.md`, text, page, language);
}

function found(isMeant: (example: Example) => boolean, text: string, where: string, language = 'ts'): string {
  const example = examples.find((example) => isMeant(example) && example.language === language && example.code.includes(text));
  if (example === undefined) throw new Error(`There is no example with '${text}' in ${where}.`);
  return example.code;
}

/** What the links of a page point at: paths from the root, and headings as GitHub names them. */
export function linksOf(page: string): { path: string; anchor: string | undefined }[] {
  const targets = [...pageOf(page).matchAll(/\]\(([^)\s]+)\)/g)].map(([, target]) => target as string);
  return targets
    .filter((target) => !target.startsWith('https://'))
    .map((target) => {
      const [path = '', anchor] = target.split('#');
      return { path: path === '' ? page : normalize(join(dirname(page), path)), anchor };
    });
}

export function anchorOf(heading: string): string {
  return heading
    .toLowerCase()
    .replace(/[^\w -]/g, '')
    .replaceAll(' ', '-');
}

function markdownIn(folder: string): string[] {
  return readdirSync(join(root, folder), { withFileTypes: true }).flatMap((entry) => {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) return FOLDERS_OF_OTHERS.includes(entry.name) || entry.name.startsWith('.') ? [] : markdownIn(path);
    return entry.name.endsWith('.md') ? [path] : [];
  });
}
