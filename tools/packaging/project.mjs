import { spawn } from 'node:child_process';
import { cp, mkdir, mkdtemp, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const STEP_LIMIT_MS = 240_000;
const sources = fileURLToPath(new URL('../../__tests__/packaging/', import.meta.url));

/** An empty folder in which somebody installs the package, and uses it. */
export class Project {
  /** @param {string} folder */
  constructor(folder) {
    this.folder = folder;
  }

  /**
   * @param {string} folder
   * @param {string[]} packages as npm install takes them
   */
  static async install(folder, packages) {
    await mkdir(folder);
    await writeFile(join(folder, 'package.json'), JSON.stringify({ private: true }));
    const project = new Project(folder);
    await project.run('npm', 'install', '--no-audit', '--no-fund', '--loglevel=error', ...packages);
    // Fails if a peer is missing, or is not of its range.
    await project.run('npm', 'ls', '--all', '--loglevel=error');
    return project;
  }

  /** @param {string} name */
  async version(name) {
    /** @type {{ version: string }} */
    const { version } = JSON.parse(await readFile(join(this.folder, 'node_modules', name, 'package.json'), 'utf8'));
    return version;
  }

  /**
   * Runs a small program of this project's, and gives what it prints.
   *
   * @param {string} file in __tests__/packaging, or made of one by {@link compile}
   * @param {string} url of the database
   * @param {string} [folder]
   * @returns {Promise<unknown>}
   */
  async runProgram(file, url, folder = this.folder) {
    if (folder === this.folder) await cp(join(sources, file), join(folder, file));
    return JSON.parse(await this.run(process.execPath, join(folder, file), { DATABASE_URL: url }));
  }

  /**
   * Compiles files in a folder of their own, strict and with an eye on declarations too.
   *
   * @param {object} program
   * @param {string} program.tsc
   * @param {Record<string, string>} program.files
   * @param {Record<string, unknown>} program.options compiler options
   * @param {string} program.type of package.json
   * @param {boolean} [program.emits]
   * @returns {Promise<string>} where it is
   */
  async compile({ tsc, files, options, type, emits = false }) {
    const folder = await mkdtemp(join(this.folder, 'program-'));
    await writeFile(join(folder, 'package.json'), JSON.stringify({ type }));
    for (const [name, text] of Object.entries(files)) await writeFile(join(folder, name), text);
    const strict = { strict: true, exactOptionalPropertyTypes: true, noUncheckedIndexedAccess: true, skipLibCheck: false };
    const compilerOptions = { ...strict, target: 'es2022', types: ['node'], noEmit: !emits, ...options };
    await writeFile(join(folder, 'tsconfig.json'), JSON.stringify({ compilerOptions, files: Object.keys(files) }));
    await this.run(process.execPath, join(tsc, 'bin/tsc'), '--pretty', 'false', '-p', folder);
    return folder;
  }

  /** @returns {Promise<Record<string, string>>} the small programs in TypeScript */
  static async programs() {
    const names = ['consumer.ts', 'testing.ts', 'tracing.ts'];
    return Object.fromEntries(await Promise.all(names.map(async (name) => [name, await readFile(join(sources, name), 'utf8')])));
  }

  /**
   * @param {string} command
   * @param {...(string | Record<string, string>)} rest arguments, and what is added to the environment
   * @returns {Promise<string>} its output
   */
  run(command, ...rest) {
    const args = rest.filter((item) => typeof item === 'string');
    const added = Object.assign({}, ...rest.filter((item) => typeof item === 'object'));
    return run(command, args, { cwd: this.folder, env: { ...cleanEnvironment(), ...added } });
  }
}

/** Without what npm tells its scripts: a person has none of it. */
function cleanEnvironment() {
  return Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(npm_(?!config_)|DATABASE_URL$|NODE_OPTIONS$)/.test(name)));
}

/**
 * Runs a command to its end.
 *
 * @param {string} command
 * @param {string[]} args
 * @param {{ cwd: string, env?: NodeJS.ProcessEnv, isLenient?: boolean }} options lenient: whatever its exit code
 * @returns {Promise<string>} its output; rejects if it fails, with all that it has said
 */
export async function run(command, args, { cwd, env = process.env, isLenient = false }) {
  const child = spawn(command, args, { cwd, env, stdio: ['ignore', 'pipe', 'pipe'], timeout: STEP_LIMIT_MS });
  let stdout = '';
  let all = '';
  child.stdout.on('data', (chunk) => {
    stdout += chunk;
    all += chunk;
  });
  child.stderr.on('data', (chunk) => (all += chunk));
  const code = await new Promise((resolve, reject) => {
    child.once('error', reject);
    child.once('close', resolve);
  });
  if (code !== 0 && !isLenient) throw new Error(`${all}\nFailed (${code}): ${[command, ...args].join(' ')}`);
  return stdout;
}
