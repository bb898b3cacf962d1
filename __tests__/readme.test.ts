import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import * as expressKnexSession from 'express-knex-session';
import { mutants } from '../chaos/mutants';
import { errorStatuses } from '../lib/errors';
import { optionDefinitions } from '../lib/resolve-options';
import { stepsFor } from '../tools/fresh-project/steps';
import { examples, headings, readme, sectionOf, tableOf } from './support/readme';
import { root, TypeScript } from './support/typescript';

const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));

describe('the README', () => {
  it('says in its first sentence what it is, and what it is not', () => {
    const [title, sentence] = readme.split('\n\n');
    expect(title).toBe(`# ${manifest.name}`);
    expect(sentence).toContain('not a login-session store');
    expect(sentence?.match(/\.(?= |$)/g)).toHaveLength(1);
  });

  it('has its sections in the order in which a reader needs them', () => {
    expect(headings).toEqual([
      'The promises',
      'Two commands',
      'What happens at the end of a request',
      'Options',
      'TypeScript',
      'With express-session',
      'One router only',
      'Errors by code',
      'Recipes',
      'When the client leaves, and when things hang',
      'Shutdown',
      'Testing your app',
      'Behind PgBouncer',
      'When one machine is not enough',
      'Reliability',
      'Why a session per request',
      '4xx that must persist',
      'Limits',
    ]);
    expect(readme.indexOf('```ts')).toBeLessThan(readme.indexOf('## The promises'));
  });

  it('makes each promise a headline', () => {
    const promises = [...sectionOf('The promises').matchAll(/^### (.+)$/gm)].map(([, promise]) => promise);
    expect(promises).toEqual(['No lie', 'No leak', 'No waste', 'No surprise', 'Cheaper than by hand']);
  });

  it('names commands that there are', () => {
    for (const [, script = ''] of readme.matchAll(/npm (?:run )?(start|test:\w+|test|bench|chaos|soak)\b/g))
      expect(manifest.scripts).toHaveProperty(script);
    expect(sectionOf('Two commands')).toContain('npm ci && npm start');
    expect(sectionOf('Two commands')).toContain('npm ci && npm test');
    const install = sectionOf('Two commands')
      .match(/npm install (.+)/)?.[1]
      ?.split(' ');
    const peers = Object.keys(manifest.peerDependencies).filter((peer) => !manifest.peerDependenciesMeta?.[peer]?.optional);
    expect(install?.sort()).toEqual([manifest.name, ...peers].sort());
  });

  it('has no dead links to itself or to files', () => {
    const anchors = new Set(
      headings.map(
        (heading) =>
          `#${heading
            .toLowerCase()
            .replace(/[^\w -]/g, '')
            .replaceAll(' ', '-')}`,
      ),
    );
    for (const [, target = ''] of readme.matchAll(/\]\(([^)]+)\)/g)) {
      if (target.startsWith('#')) expect(anchors).toContain(target);
      else if (!target.startsWith('https://')) expect([target, existsSync(join(root, target))]).toEqual([target, true]);
    }
  });
});

describe("the README's table of options", () => {
  const server = "the server's";
  const whoDecides = {
    isolationLevel: server,
    readOnly: server,
    deferrable: server,
    settings: 'none',
    role: 'none',
    onError: "Knex's logger",
  };
  const rows = tableOf('Options');

  it('has all that there are, and no other', () => {
    expect(rows.map(([name]) => name)).toEqual(Object.keys(optionDefinitions).map((name) => `\`${name}\``));
  });

  it.each(Object.entries(optionDefinitions))('tells the default and the kind of %s', (name, definition) => {
    const [, shown, perRequest] = rows.find(([cell]) => cell === `\`${name}\``) ?? [];
    const { default: value } = definition;
    if (typeof value === 'string') expect(shown).toBe(`\`'${value}'\``);
    else if (typeof value === 'function') expect(value.toString()).toContain(shown?.slice(1, -1));
    else expect(shown).toBe(value === undefined ? whoDecides[name as keyof typeof whoDecides] : `\`${value}\``);
    expect(perRequest).toBe(definition.perRequest ? 'yes' : definition.isValid(() => true) ? '-' : 'no');
  });
});

describe("the README's table of broken copies", () => {
  it('has those of npm run chaos -- --mutants', () => {
    const rows = sectionOf('Reliability')
      .split('\n')
      .filter((line) => line.startsWith('| '))
      .map((line) => line.slice(2).split(' | ')[0]);
    expect(rows.slice(rows.indexOf('a copy that ...') + 2)).toEqual(mutants.map(({ name }) => name));
  });
});

describe("the README's table of errors", () => {
  it('has each code with its status, and no other', () => {
    const rows = tableOf('Errors by code').map(([code = '', status]) => [code.slice(1, -1), Number(status)]);
    expect(rows).toEqual(Object.entries(errorStatuses));
  });

  it('says for each what happened and what to do', () => {
    for (const row of tableOf('Errors by code')) expect(row.map((cell) => cell.length > 0)).toEqual([true, true, true, true]);
  });

  it('is the only place that codes come from', () => {
    for (const [code] of readme.matchAll(/\bERR_\w+/g)) expect(errorStatuses).toHaveProperty(code);
  });
});

describe("the README's chapter on tests", () => {
  const chapter = sectionOf('Testing your app');

  it('has a file or commands in each block, for both runners', () => {
    for (const runner of ['Jest', 'Vitest']) {
      const steps = stepsFor(readme, runner);
      const files = steps.flatMap((step) => ('file' in step ? [step.file] : []));
      const commands = steps.flatMap((step) => ('command' in step ? [step.command] : []));
      expect(new Set(files).size).toBe(files.length);
      expect(commands).toEqual(expect.arrayContaining(['mkdir ledger && cd ledger', 'npm test']));
    }
  });

  it('installs what the package needs', () => {
    const install = /^npm install (?!--)(.+)$/m.exec(chapter)?.[1]?.split(' ');
    expect(install?.sort()).toEqual(
      [manifest.name, ...Object.keys(manifest.peerDependencies)].filter((name) => !name.startsWith('@')).sort(),
    );
  });

  it('says of each error of tests when it comes', () => {
    const listed = [...chapter.matchAll(/^- `(ERR_TEST_\w+)`/gm)].map(([, code]) => code);
    expect(listed.sort()).toEqual(
      Object.keys(errorStatuses)
        .filter((code) => code.startsWith('ERR_TEST_'))
        .sort(),
    );
  });
});

describe("the README's TypeScript examples", () => {
  /** What an example may use of those before it, or of the reader's app. */
  const ambient = `
    import type expressModule from 'express';
    import type { Express, RequestHandler } from 'express';
    import type * as ours from 'express-knex-session';
    import type { Knex } from 'knex';
    declare global {
      const express: typeof expressModule;
      const knex: Knex;
      const app: Express;
      const hash: (password: string) => string;
      const tenantOf: (req: expressModule.Request) => number;
      const sendMail: (about: object) => Promise<void>;
      const charge: (order: string, options: { signal: AbortSignal }) => Promise<string>;
      const createKnex: typeof import('knex').default;
      ${Object.keys(expressKnexSession)
        .map((name) => `const ${name}: typeof ours.${name};`)
        .join('\n')}
    }
  `;
  const registers = (code: string) => code.includes('interface Register');
  const asFiles = (chosen: typeof examples) =>
    Object.fromEntries(
      chosen.map(({ code }) => [`example-${examples.findIndex((example) => example.code === code)}.ts`, `${code}\nexport {};\n`]),
    );

  let typescript: TypeScript;
  beforeAll(async () => {
    typescript = await TypeScript.open();
  });
  afterAll(() => typescript.close());

  it('compile', async () => {
    const files = asFiles(examples.filter(({ code }) => !registers(code) && !code.includes("from 'express-session'")));
    expect(Object.keys(files).length).toBeGreaterThan(8);
    expect(await typescript.compile({ type: 'module', files: { 'ambient.d.ts': ambient, ...files } })).toBe('');
  });

  it('compile where another property is registered, beside express-session', async () => {
    const files = asFiles(examples.filter(({ code }) => registers(code) || code.includes("from 'express-session'")));
    expect(Object.keys(files)).toHaveLength(2);
    expect(await typescript.compile({ type: 'module', files: { 'ambient.d.ts': ambient, ...files } })).toBe('');
  });

  it('import by name what there is, and show each function at least once', () => {
    const code = examples.map(({ code }) => code).join('\n');
    const functions = Object.keys(expressKnexSession).filter((name) => /^[a-z]|^SessionError$/.test(name));
    expect(functions.length).toBeGreaterThan(8);
    for (const name of [...functions, 'testDatabase']) expect(code).toContain(name);
  });
});
