import { describe } from './describe';
import { isWithin, type Level } from './open-savepoints';
import type { Session } from './session';

export type HookKind = 'beforeCommit' | 'afterCommit' | 'afterRollback';
export type Hook = (session: Session) => unknown;

interface Registered {
  readonly kind: HookKind;
  readonly hook: Hook;
  readonly level: Level;
  readonly session: Session;
}

/** @throws TypeError for what cannot be called */
export function mustBeHook(kind: HookKind, hook: unknown): void {
  if (typeof hook !== 'function')
    throw new TypeError(`Expected the hook of \`${kind}\` to be a function (session) => ..., got ${describe(hook)}.`);
}

/** What the application wants done around the end of a unit of work. */
export class Hooks {
  private registered: Registered[] = [];

  add(kind: HookKind, hook: unknown, level: Level, session: Session): void {
    this.registered.push({ kind, hook: hook as Hook, level, session });
  }

  /** A savepoint was rolled back, and what was registered in it with it. */
  drop(savepoint: Level): void {
    this.registered = this.registered.filter(({ level }) => !isWithin(level, savepoint));
  }

  /** Calls all of a kind, one after the other, also those that the earlier ones register. */
  async run(kind: HookKind, call: (hook: Hook, session: Session) => Promise<unknown>): Promise<void> {
    for (;;) {
      const index = this.registered.findIndex((registered) => registered.kind === kind);
      if (index < 0) return;
      const [{ hook, session }] = this.registered.splice(index, 1) as [Registered];
      await call(hook, session);
    }
  }
}
