import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

/** Another TypeScript file in a process of its own, which answers questions. */
export class Child {
  private readonly process: ChildProcess;
  private readonly exited: Promise<unknown>;
  /** Rejects when the process ends by itself. */
  readonly died: Promise<never>;
  private readonly pending = new Map<number, (answer: unknown) => void>();
  private count = 0;

  constructor(
    private readonly file: string,
    settings: object,
    { execArgv = [], onNews }: { execArgv?: string[]; onNews?: (news: never) => void } = {},
  ) {
    this.process = fork(join(__dirname, file), [JSON.stringify(settings)], {
      execArgv: ['--import', 'tsx', ...execArgv],
      env: { ...process.env, NODE_OPTIONS: '', NODE_ENV: 'production' },
      // Standard output belongs to the report.
      stdio: ['ignore', 2, 2, 'ipc'],
    });
    this.exited = once(this.process, 'exit');
    this.died = this.exited.then(() => Promise.reject(new ChildFailed(`The process of ${file} ended before its time.`)));
    this.died.catch(() => {});
    this.process.on('message', ({ id, answer, news }: Message) => {
      if (id === undefined) return onNews?.(news as never);
      this.pending.get(id)?.(answer);
      this.pending.delete(id);
    });
  }

  /** Rejects if the process ends first, or says nothing for far too long. */
  async ask<Answer>(question: string, details?: unknown): Promise<Answer> {
    const id = this.count++;
    const answered = new Promise<Answer>((resolve) => this.pending.set(id, resolve as (answer: unknown) => void));
    if (this.process.connected) this.process.send({ id, question, details });
    const silence = new AbortController();
    const silent = sleep(SILENCE_MS, undefined, silence).then(() =>
      Promise.reject(new ChildFailed(`${this.file} did not answer '${question}'.`)),
    );
    try {
      return await Promise.race([answered, this.died, silent]);
    } finally {
      silence.abort();
      silent.catch(() => {});
    }
  }

  async stop(): Promise<void> {
    this.process.kill('SIGKILL');
    await this.exited;
  }
}

/** Longer than anything that a child does. */
const SILENCE_MS = 30_000;

export class ChildFailed extends Error {}

interface Message {
  id?: number;
  question: string;
  details: never;
  answer?: unknown;
  news?: unknown;
}

/** In the child: what it answers. Its process ends with its parent. */
export function answerQuestions(answers: Record<string, (details: never) => unknown>): void {
  process.on('disconnect', () => process.exit());
  process.on('message', async ({ id, question, details }: Message) => {
    const answer = await answers[question]?.(details);
    if (process.connected) process.send?.({ id, answer });
  });
}

/** In the child: something that nobody has asked for. */
export function tell(news: unknown): void {
  if (process.connected) process.send?.({ news });
}

export function settingsOf<Settings>(): Settings {
  return JSON.parse(process.argv[2] ?? '{}');
}
