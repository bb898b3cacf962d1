import { execFile } from 'node:child_process';
import { cp, mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { promisify } from 'node:util';

export const root = join(__dirname, '..', '..');
const run = promisify(execFile);

/** Runs tsc and gives what it says; nothing is ''. TypeScript 7 has no API: its command is what users run. */
async function tsc(...args: string[]): Promise<string> {
  return run(process.execPath, [join(root, 'node_modules/typescript/bin/tsc'), '--pretty', 'false', ...args]).then(
    ({ stdout }) => stdout,
    ({ stdout, message }) => stdout || message,
  );
}

export interface TypedProject {
  /** What is in package.json. */
  type?: 'module' | 'commonjs';
  compilerOptions?: object;
  /** Modules that stand for others, or are needed too. */
  links?: Record<string, string>;
  /** File names and what is in them. */
  files: Record<string, string>;
}

/** Compiles projects that have the package installed, as far as TypeScript sees it. */
export class TypeScript {
  private constructor(private readonly folder: string) {}

  /** Makes the package's declarations; `close` removes them. */
  static async open(): Promise<TypeScript> {
    const folder = await mkdtemp(join(tmpdir(), 'types-test-'));
    const errors = await tsc('-p', join(root, 'tsconfig.build.json'), '--emitDeclarationOnly', '--outDir', join(folder, 'dist'));
    if (errors) throw new Error(errors);
    return new TypeScript(folder);
  }

  close(): Promise<void> {
    return rm(this.folder, { recursive: true, force: true });
  }

  /** Gives the complaints of tsc, strict, and with an eye on declarations too; none is ''. */
  async compile({ type = 'commonjs', compilerOptions = {}, links = {}, files }: TypedProject): Promise<string> {
    const project = await mkdtemp(join(this.folder, 'project-'));
    const installed = join(project, 'node_modules/express-knex-session');
    await mkdir(installed, { recursive: true });
    await cp(join(root, 'package.json'), join(installed, 'package.json'));
    await cp(join(this.folder, 'dist'), join(installed, 'dist'), { recursive: true });
    const modules = ['express', 'knex', 'pg', 'express-session', '@types/express', '@types/express-session', '@types/node'];
    for (const module of new Set([...modules, ...Object.keys(links)])) {
      const path = join(project, 'node_modules', module);
      await mkdir(dirname(path), { recursive: true });
      await symlink(join(root, 'node_modules', links[module] ?? module), path);
    }
    await writeFile(join(project, 'package.json'), JSON.stringify({ type }));
    for (const [name, text] of Object.entries(files)) await writeFile(join(project, name), text);
    const strict = { strict: true, noUncheckedIndexedAccess: true, skipLibCheck: false, module: 'nodenext', types: ['node'] };
    const config = { compilerOptions: { ...strict, target: 'es2022', noEmit: true, ...compilerOptions }, files: Object.keys(files) };
    await writeFile(join(project, 'tsconfig.json'), JSON.stringify(config));
    return tsc('-p', project);
  }
}
