import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { resolve } from 'node:path';
import { createInterface, type Interface } from 'node:readline';

export interface RestartableServer {
  stop(): Promise<void>;
  /** Ends the server as a crash would, and starts it again on the same port. */
  restart(): Promise<void>;
}

/** A PostgreSQL of the file's own, on which its databases are made. Call it before what makes them, and stop it after they are gone. */
export function useRestartableServer(): RestartableServer {
  let app: ChildProcess;
  let lines: Interface;
  const answer = async (): Promise<{ url: string }> => {
    const [line] = (await once(lines, 'line')) as [string];
    const told = JSON.parse(line);
    if (told.error) throw new Error(told.error);
    return told;
  };
  beforeAll(async () => {
    const settings = { max_connections: 50, fsync: 'off' };
    // A process of its own: Jest cannot load the launcher, an ES module, into its sandbox.
    app = spawn(process.execPath, [resolve('__tests__/support/launch.mjs'), JSON.stringify({ settings })], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    lines = createInterface({ input: app.stdout as NonNullable<ChildProcess['stdout']> });
    process.env['TEST_DATABASE_URL'] = (await answer()).url;
  });
  return {
    async stop() {
      const exited = once(app, 'exit');
      app.kill('SIGTERM');
      await exited;
    },
    async restart() {
      const restarted = answer();
      app.kill('SIGUSR2');
      await restarted;
    },
  };
}
