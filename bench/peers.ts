import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';

/** The benchmark's own dependencies: none of them is one of the package. */
export function installPeers(): void {
  if (existsSync(join(__dirname, 'node_modules', '.package-lock.json'))) return;
  console.error('Installing what the benchmark compares the package with (npm ci, in bench/) ...');
  execFileSync('npm', ['ci', '--no-audit', '--no-fund', '--loglevel=error'], {
    cwd: __dirname,
    stdio: ['ignore', 'ignore', 'inherit'],
    shell: process.platform === 'win32',
  });
}

/** Not by `import`: the type check must pass where they are not installed. */
export const requirePeer: (name: string) => any = createRequire(join(__dirname, 'package.json'));

/** A package's version: the benchmark's own copy, or else the one of the root. */
export function versionOf(name: string): string {
  const folder = [__dirname, join(__dirname, '..')].find((at) => existsSync(join(at, 'node_modules', name, 'package.json')));
  return requirePeer(join(folder ?? '', 'node_modules', name, 'package.json')).version;
}
