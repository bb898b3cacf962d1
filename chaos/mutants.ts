import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ChildFailed } from './child';
import { failuresOf } from './report';
import { runStorm } from './storm';

interface Mutant {
  /** Completes "the package that ...". */
  name: string;
  edits: Edit[];
}

interface Edit {
  file: string;
  /** The exact text in `lib/`, and what stands there in the mutant. */
  text: string;
  replacement: string;
}

/** The faults that the storm must find: what careless implementations do. */
export const mutants: Mutant[] = [
  {
    name: 'settles on `finish`, after the response',
    edits: [
      {
        file: 'request-session.ts',
        text: "if (this.commitAt === 'finish') {\n      res.once(",
        replacement: "if (this.commitAt === 'head') this.commitAt = 'finish';\n    if (this.commitAt === 'finish') {\n      res.once(",
      },
    ],
  },
  {
    name: "does not look at COMMIT's tag",
    edits: [
      {
        file: 'connection.ts',
        text: 'tag = await runCommand(this.pg, COMMIT);',
        replacement: "tag = await runCommand(this.pg, COMMIT).then(() => 'COMMIT');",
      },
    ],
  },
  {
    name: 'gives connections back, and takes them, without looking at them',
    edits: [
      {
        file: 'connection.ts',
        text: 'this.pool.release(this.pg, this.lostBecause ?? reason ?? unclean, this.client);',
        replacement: 'this.pool.release(this.pg, this.lostBecause, this.client);',
      },
      {
        file: 'knex-face.ts',
        text: 'if (connection.isClean || !isWanted) return connection;',
        replacement: 'if (connection.isClean || isWanted !== undefined) return connection;',
      },
    ],
  },
  {
    name: 'waits for COMMIT without a bound',
    edits: [
      {
        file: 'connection-hold.ts',
        text: "this.bounded('COMMIT was not answered', this.connection.commit(abortedBy), (error) => new CommitUnknownError(error))",
        replacement: 'this.connection.commit(abortedBy)',
      },
    ],
  },
  {
    name: 'lets a transaction stay open without a bound',
    edits: [{ file: 'connection-hold.ts', text: 'else onTooLong();', replacement: 'else void onTooLong;' }],
  },
];

/** A fault that only some storms bring out, as when all connections are cut before one has waited too long for COMMIT, has this many. */
const STORMS = 3;

/** A short storm on each, and on the package as it is. @returns whether all were caught, and nothing else */
export async function runMutants({ seconds, seed, libFolder }: { seconds: number; seed: number; libFolder: string }): Promise<boolean> {
  const copies = await mkdtemp(join(tmpdir(), 'chaos-mutants-'));
  try {
    const folders = await Promise.all(mutants.map((mutant, index) => copyOf(libFolder, mutant, join(copies, String(index)))));
    const control = await findings({ seconds, seed, libFolder });
    console.log(`the package as it is: ${control.length === 0 ? 'nothing is wrong' : control.join('; ')}`);
    let survivors = 0;
    for (const [index, { name }] of mutants.entries()) {
      let found: string[] = [];
      for (let storm = 0; storm < STORMS && found.length === 0; storm++) {
        found = await findings({ seconds, seed: seed + storm, libFolder: folders[index] as string });
      }
      if (found.length === 0) survivors++;
      console.log(`mutant that ${name}: ${found.length === 0 ? 'SURVIVED' : `caught by\n  ${found.join('\n  ')}`}`);
    }
    return control.length === 0 && survivors === 0;
  } finally {
    await rm(copies, { recursive: true, force: true });
  }
}

async function copyOf(libFolder: string, { name, edits }: Mutant, folder: string): Promise<string> {
  await cp(libFolder, folder, { recursive: true });
  for (const { file, text, replacement } of edits) {
    const path = join(folder, file);
    const source = await readFile(path, 'utf8');
    if (source.split(text).length !== 2) throw new Error(`The mutant that ${name} expects this once in lib/${file}: ${text}`);
    await writeFile(
      path,
      source.replace(text, () => replacement),
    );
  }
  return folder;
}

async function findings(options: { seconds: number; seed: number; libFolder: string }): Promise<string[]> {
  try {
    return failuresOf(await runStorm(options)).map(({ name, value }) => `${name}: ${value}`);
  } catch (error) {
    if (error instanceof ChildFailed) return [error.message];
    throw error;
  }
}
