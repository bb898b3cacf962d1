import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { ratioTable, targetTable } from '../bench/markdown';
import { errorStatuses } from '../lib/errors';
import { optionDefinitions } from '../lib/resolve-options';
import { readGuide, stepsFor } from '../tools/fresh-project/steps';
import { headings, pageOf, pages, readme, sectionOf, tableIn } from './support/pages';
import { root } from './support/typescript';

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
      'Testing your app',
      'Options',
      'TypeScript',
      'With express-session',
      'Errors by code',
      'Recipes',
      'See it',
      'Reliability',
      'What it costs',
      'Versions',
      'Why a session per request',
      'Limits',
      'Documentation',
    ]);
    expect(readme.indexOf('```ts')).toBeLessThan(readme.indexOf('## The promises'));
  });

  it('makes each promise a headline', () => {
    const promises = [...sectionOf('The promises').matchAll(/^### (.+)$/gm)].map(([, promise]) => promise);
    expect(promises).toEqual(['No lie', 'No leak', 'No waste', 'No surprise', 'Cheaper than by hand']);
  });

  it('names commands that there are', () => {
    expect(sectionOf('Two commands')).toContain('npm ci && npm start');
    expect(sectionOf('Two commands')).toContain('npm ci && npm test');
    const install = sectionOf('Two commands')
      .match(/npm install (.+)/)?.[1]
      ?.split(' ');
    const peers = Object.keys(manifest.peerDependencies).filter((peer) => !manifest.peerDependenciesMeta?.[peer]?.optional);
    expect(install?.sort()).toEqual([manifest.name, ...peers].sort());
  });

  it('fits on a page: what is for few is elsewhere', () => {
    expect(readme.length).toBeLessThan(30_000);
  });

  it('has the figures of the last benchmark', () => {
    const results = JSON.parse(readFileSync(join(root, 'bench/results.json'), 'utf8'));
    expect(sectionOf('What it costs')).toContain(ratioTable(results));
    expect(readFileSync(join(root, 'bench/README.md'), 'utf8')).toContain(targetTable(results));
  });

  it('lists every recipe, once', () => {
    const listed = tableIn(sectionOf('Recipes')).map(([, recipe]) => /\((.+)\)/.exec(recipe ?? '')?.[1]);
    expect(listed.sort()).toEqual([...pages.keys()].filter((page) => page.startsWith('docs/recipes/')));
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
  const rows = tableIn(sectionOf('Options'));

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

describe("the README's chapter on tests", () => {
  const chapter = sectionOf('Testing your app');

  it('has a file or commands in each block, for both runners', () => {
    for (const runner of ['Jest', 'Vitest']) {
      const steps = stepsFor(readGuide(root), runner);
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

  it('leads to a page that says of each error of tests when it comes', () => {
    const listed = [...pageOf('docs/testing.md').matchAll(/^- `(ERR_TEST_\w+)`/gm)].map(([, code]) => code);
    expect(listed.sort()).toEqual(
      Object.keys(errorStatuses)
        .filter((code) => code.startsWith('ERR_TEST_'))
        .sort(),
    );
  });
});
