import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import * as expressKnexSession from 'express-knex-session';
import { mutants } from '../chaos/mutants';
import { errorStatuses } from '../lib/errors';
import { ambient } from './support/ambient';
import { documented, examplesOf } from './support/doc-comments';
import { anchorOf, examples, headingsOf, linksOf, pageOf, pages, sectionOf, tableIn } from './support/pages';
import { root, TypeScript } from './support/typescript';

/* All Markdown files, and the doc comments of what is exported. */

describe.each([...pages.keys()])('%s', (page) => {
  it('has no dead links', () => {
    for (const { path, anchor } of linksOf(page)) {
      expect([path, existsSync(join(root, path))]).toEqual([path, true]);
      if (anchor !== undefined) expect(headingsOf(path).map(anchorOf)).toContain(anchor);
    }
  });

  it('names commands that there are', () => {
    const { scripts } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
    for (const [, script = ''] of pageOf(page).matchAll(/`?npm run (?:--silent )?([\w:]+)/g)) expect(scripts).toHaveProperty([script]);
  });

  it('names codes of errors that there are', () => {
    for (const [code] of pageOf(page).matchAll(/\bERR_\w+/g)) expect(errorStatuses).toHaveProperty(code);
  });
});

describe('the pages', () => {
  it('of docs can all be reached from the README', () => {
    const reached = new Set(['README.md']);
    for (const page of reached) for (const { path } of pages.has(page) ? linksOf(page) : []) reached.add(path);
    expect([...pages.keys()].filter((page) => page.startsWith('docs/') && !reached.has(page))).toEqual([]);
  });

  it('have their examples in languages that a test compiles or runs, or in those of other frameworks', () => {
    // What has no language is none: what a command prints, or takes.
    const others = examples.filter(({ language }) => !['', 'ts', 'js', 'sh', 'sql'].includes(language));
    expect(new Set(others.map(({ page }) => page))).toEqual(new Set(['docs/recipes/other-frameworks.md']));
    // Followed word by word: packaging.test.ts, npm run fresh.
    const followed = examples
      .filter(({ language }) => language === 'js')
      .map(({ page, section }) => (page === 'README.md' ? section : page));
    expect(new Set(followed)).toEqual(new Set(['Testing your app', 'docs/testing.md']));
  });
});

describe('docs/errors.md', () => {
  const page = 'docs/errors.md';
  const codes = headingsOf(page, 2).filter((heading) => heading.startsWith('ERR_'));

  it('has each code, and no other', () => {
    expect(codes).toEqual(Object.keys(errorStatuses));
  });

  it.each(Object.entries(errorStatuses))('says of %s its status, what happened, and what to do', (code, status) => {
    expect(sectionOf(code, page)).toMatch(
      new RegExp(`^${code}\\n\\nStatus ${status}\\.\\n\\n\\*\\*What happened\\.\\*\\* .+\\n\\n\\*\\*What to do\\.\\*\\* .+`),
    );
  });
});

describe('docs/reliability.md', () => {
  it('has the broken copies of npm run chaos -- --mutants', () => {
    const [, table = ''] = pageOf('docs/reliability.md').split(/^(?=\| a copy that \.\.\.)/m);
    expect(tableIn(table).map(([name]) => name)).toEqual(mutants.map(({ name }) => name));
  });
});

describe('the doc comments', () => {
  const isOption = ({ name }: { name: string }) => /Options\./.test(name);
  /** It says what the other one says, which has the example. */
  const isAsAnother = ({ doc }: { doc: string }) => doc.startsWith('As {@link');

  it('are on every export, and on every member of its interfaces', () => {
    expect(documented.length).toBeGreaterThan(60);
    expect(documented.filter(({ doc }) => !/^[A-Z`'].*\w/.test(doc)).map(({ name }) => name)).toEqual([]);
  });

  it('number what a function does, and name what it throws', () => {
    const functions = documented.filter(({ kind }) => kind === 'function');
    expect(functions.filter(({ doc }) => !/^1\. /m.test(doc)).map(({ name }) => name)).toEqual([]);
    expect(functions.filter(({ doc, source }) => /\bthrow /.test(source) && !/^@throws /m.test(doc)).map(({ name }) => name)).toEqual([]);
  });

  it('give the default of every option', () => {
    expect(documented.filter((one) => isOption(one) && !/^@default ./m.test(one.doc)).map(({ name }) => name)).toEqual([]);
  });

  // A type, and a plain property, is explained by the functions that take or give it.
  it('have an example for all that is called, extended or set', () => {
    const isUsed = ({ kind, name }: (typeof documented)[number]) =>
      kind === 'function' || kind === 'class' || kind === 'method' || (isOption({ name }) && !name.startsWith('WithSessionOptions.'));
    const wanting = documented.filter((one) => isUsed(one) && !isAsAnother(one) && examplesOf(one).length === 0);
    expect(wanting.map(({ name }) => name)).toEqual([]);
    expect(documented.filter(({ doc }) => /@example\s*($|\n@)/.test(doc)).map(({ name }) => name)).toEqual([]);
  });

  it('leave no option of withSession() without the example of the middleware', () => {
    const options = documented.filter(({ name }) => name.startsWith('WithSessionOptions.')).map(({ name }) => name.split('.')[1]);
    expect(options.length).toBeGreaterThan(5);
    for (const name of options) expect(documented.map((one) => one.name)).toContain(`SessionOptions.${name}`);
  });
});

describe('the TypeScript examples of all pages and doc comments', () => {
  const isOfRegistered = (code: string) => code.includes('interface Register') || code.includes("from 'express-session'");
  // That one is compiled by tools/apollo.mjs, which installs the types that it takes.
  const isOfApollo = (page: string) => page === 'docs/recipes/graphql.md';
  const written = examples
    .filter(({ language, page }) => language === 'ts' && !isOfApollo(page))
    .map(({ page, code }) => ({ name: page, code: `${code}\nexport {};\n` }));
  const commented = documented.flatMap((one) => examplesOf(one).map((code) => ({ name: one.name, code })));
  const all = [...written, ...commented];
  const asFiles = (chosen: typeof all) =>
    Object.fromEntries(chosen.map(({ name, code }, index) => [`${name.replace(/\W/g, '-')}-${index}.ts`, code]));

  let typescript: TypeScript;
  beforeAll(async () => {
    typescript = await TypeScript.open();
  });
  afterAll(() => typescript.close());
  jest.setTimeout(60_000);

  const compile = (chosen: typeof all) =>
    typescript.compile({
      type: 'module',
      links: Object.fromEntries(
        [
          'objection',
          'graphile-worker',
          'prom-client',
          '@opentelemetry/api',
          '@opentelemetry/sdk-trace-node',
          ...['', '-http', '-express', '-pg'].map((name) => `@opentelemetry/instrumentation${name}`),
        ].map((name) => [name, name]),
      ),
      files: { 'ambient.d.ts': ambient, ...asFiles(chosen) },
    });

  it('compile', async () => {
    expect(written.length).toBeGreaterThan(40);
    expect(commented.length).toBeGreaterThan(40);
    expect(await compile(all.filter(({ code }) => !isOfRegistered(code)))).toBe('');
  });

  it('compile where another property is registered, beside express-session', async () => {
    const chosen = all.filter(({ code }) => isOfRegistered(code));
    expect(chosen.map(({ name }) => name)).toEqual(expect.arrayContaining(['README.md', 'Register']));
    expect(await compile(chosen)).toBe('');
  });

  it('import by name what there is, and show each function at least once', () => {
    const code = written.map(({ code }) => code).join('\n');
    const functions = Object.keys(expressKnexSession).filter((name) => /^[a-z]|^SessionError$/.test(name));
    expect(functions.length).toBeGreaterThan(8);
    for (const name of [...functions, 'testDatabase', 'traceSessions']) expect(code).toContain(name);
  });
});

describe("CONTRIBUTING's table of layers", () => {
  const lib = join(root, 'lib');
  const layers = tableIn(pageOf('CONTRIBUTING.md').split(/^(?=\| layer )/m)[1] ?? '').map(([, files = '']) =>
    [...files.matchAll(/`([^`]+)`/g)].map(([, file]) => file as string),
  );
  const layerOf = (file: string) => layers.findIndex((files) => files.includes(file));
  const files = readdirSync(lib, { recursive: true, encoding: 'utf8' }).flatMap((file) =>
    file.endsWith('.ts') ? [file.slice(0, -3)] : [],
  );

  /** What is there when the program runs. */
  function importsOf(file: string): string[] {
    const statements = readFileSync(join(lib, `${file}.ts`), 'utf8').matchAll(/^(?:import|export) (?!type )([^;]*?) ?from '(\.[^']+)';$/gm);
    const isOfTypes = (names: string) => /^\{(\s*type \w+,?)+\s*\}$/.test(names);
    return [...statements].flatMap(([, names = '', path = '']) => (isOfTypes(names) ? [] : [join(dirname(file), path)]));
  }

  it('has each file of lib once, and no other', () => {
    expect(layers.flat().sort()).toEqual(files.sort());
  });

  it.each(files)('is right about what %s imports', (file) => {
    expect(importsOf(file).filter((imported) => layerOf(imported) < layerOf(file))).toEqual([]);
  });
});
