import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { eventually } from './pool';

/** The example app in its own process, as `npm start` runs it. */
export interface Started {
  /** With the exit code; null if a signal killed it. */
  exit: Promise<number | null>;
  output(): string;
  errors(): string;
  /** Resolves with all output as soon as it has `text`. */
  says(text: string): Promise<string>;
  url(): Promise<string>;
  signal(signal: NodeJS.Signals): void;
}

const running: Started[] = [];

/** The command of `npm start`, without npm. */
export function startExampleApp(
  env: NodeJS.ProcessEnv,
  [command, ...args]: [string, ...string[]] = [process.execPath, '--import', 'tsx', 'example-app/server.ts'],
): Started {
  const child = spawn(command, args, {
    cwd: join(__dirname, '../..'),
    env: { ...process.env, NODE_OPTIONS: '', npm_lifecycle_event: '', PORT: '0', ...env },
  });
  let output = '';
  let errors = '';
  child.stdout.on('data', (chunk: Buffer) => {
    output += chunk.toString();
  });
  child.stderr.on('data', (chunk: Buffer) => {
    output += chunk.toString();
    errors += chunk.toString();
  });
  const exit = once(child, 'close').then(([code]) => code as number | null);
  let ended = false;
  void exit.then(() => (ended = true));

  const app: Started = {
    exit,
    output: () => output,
    errors: () => errors,
    says: (text) =>
      eventually(() => {
        if (!ended) expect(output).toContain(text);
        return output;
      }, 30_000),
    url: async () => {
      const [url] = (await app.says('Ctrl-C stops it.')).match(/http:\S+/) ?? [];
      if (!url) throw new Error(`It did not start:\n${output}`);
      return url;
    },
    signal: (signal) => child.kill(signal),
  };
  running.push(app);
  return app;
}

/** For afterEach: a test that fails leaves nothing behind. */
export async function killExampleApps(): Promise<void> {
  for (const app of running.splice(0)) {
    app.signal('SIGKILL');
    await app.exit;
  }
}
