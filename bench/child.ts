import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';

/** A process that answers each message with one. Plain Node, not tsx, whose helpers would be measured too. */
export class Child {
  private readonly process: ChildProcess;
  private readonly exited: Promise<unknown>;

  /** @param profileFolder where it leaves a CPU profile at its end */
  constructor(
    file: string,
    args: string[],
    { execArgv = [], profileFolder }: { execArgv?: string[]; profileFolder?: string | undefined } = {},
  ) {
    const profiling = profileFolder
      ? ['--cpu-prof', `--cpu-prof-dir=${profileFolder}`, `--cpu-prof-name=${args[0] ?? file}.cpuprofile`]
      : [];
    this.process = fork(join(__dirname, file), args, {
      execArgv: [...execArgv, ...profiling],
      env: { ...process.env, NODE_OPTIONS: '', NODE_ENV: 'production' },
    });
    this.exited = once(this.process, 'exit');
  }

  async ask<Answer>(question: string): Promise<Answer> {
    const died = this.exited.then(() => Promise.reject(new Error('A process of the benchmark died.')));
    this.process.send(question);
    const [answer] = await Promise.race([once(this.process, 'message'), died]);
    return answer;
  }

  async stop(): Promise<void> {
    this.process.send('stop');
    await this.exited;
  }
}
