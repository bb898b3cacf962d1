import { ServerResponse } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import type { NextFunction, Request, RequestHandler, Response } from 'express';
import { sessionsOn } from './attached-sessions';
import { requestInContext, runInContext } from './context';
import type { Internals } from './deferred-head';
import { isGone } from './disconnect';
import { SessionError } from './errors';
import { isRetryable } from './is-retryable';
import type { RequestSession } from './request-session';
import { SavedHead } from './response-head';

/** What is the same for all attempts of a request. */
interface Task {
  readonly handler: RequestHandler<any, any, any, any, any>;
  readonly attempts: number;
  readonly req: Request;
  readonly res: Response;
  readonly next: NextFunction;
  /** Whether sessions are kept in context: a later attempt may begin where it has been lost. */
  readonly isInContext: boolean;
}

/** One run of a retryable handler: its sessions, and its own view of the request and the response. */
export class Attempt {
  /** Whether another one takes its place. */
  isOver = false;
  private readonly head: SavedHead;
  private hasPassedOn = false;
  /** Set when it has been decided that an error leads to another attempt. */
  private failedBy: unknown;

  private constructor(
    private readonly task: Task,
    private readonly number: number,
    private readonly sessions: RequestSession[],
    private readonly mayFail: boolean,
  ) {
    this.head = new SavedHead(task.res, undefined);
    for (const session of sessions) session.begin(this);
  }

  static first(task: Omit<Task, 'isInContext'>): void {
    const { req, res, handler, next } = task;
    if (ATTEMPT in req) {
      // The outer one repeats it.
      callAsync(() => handler(req, res, next)).catch(next);
      return;
    }
    const sessions = sessionsOn(req);
    if (sessions.length === 0) {
      next(
        new SessionError(
          'ERR_SESSION_MISSING',
          'retryable() has found no session. Mount app.use(sessionMiddleware(knex)) before this route, not inside of it.',
        ),
      );
      return;
    }
    // What ran before would be lost with the first attempt, and not be done again.
    const mayFail = sessions.every((session) => !session.hasWork);
    new Attempt({ ...task, isInContext: requestInContext() !== undefined }, 1, sessions, mayFail).run();
  }

  /** Whether an error leads to another attempt; asked before anything else comes of it, and of its hooks. */
  takes(error: unknown): boolean {
    if (this.failedBy !== undefined) return this.failedBy === error;
    const { req, res, attempts } = this.task;
    const mayRepeat = this.mayFail && !this.isOver && !this.hasPassedOn && this.number < attempts && !this.hasSent;
    if (!mayRepeat || !isRetryable(error) || isGone(req, res) || this.sessions.some((session) => session.hasLastingWork)) return false;
    this.failedBy = error;
    return true;
  }

  /** Whether anything has left, be it to middleware that keeps it. */
  private get hasSent(): boolean {
    const gates = this.sessions.flatMap(({ hasHandedOn }) => hasHandedOn ?? []);
    // Not `headersSent`, which is true while the response waits.
    return gates.length > 0 ? gates.includes(true) : (this.task.res as Response & Internals)._header !== null;
  }

  private run(): void {
    const { handler, isInContext } = this.task;
    const req = this.request();
    const res = this.response(req);
    const next = ((error?: unknown) => void this.passOn(error)) as NextFunction;
    for (const [name, value] of Object.entries({ res, next }))
      Object.defineProperty(req, name, { configurable: true, writable: true, value });
    const work = (): Promise<unknown> => callAsync(() => handler(req, res, next));
    (isInContext ? runInContext(req, work) : work()).catch((error) => this.fail(error));
  }

  private passOn(error: unknown): void {
    if (error !== undefined && error !== 'route' && error !== 'router') void this.fail(error);
    else this.leave(error);
  }

  /** To what comes after the handler; there is no way back from there. */
  private leave(error: unknown): void {
    if (this.isOver) return;
    this.hasPassedOn = true;
    this.task.next(error as never);
  }

  private async fail(error: unknown): Promise<void> {
    if (this.isOver) return;
    const decided = this.sessions.flatMap((session) => session.decided ?? []);
    if (decided.length > 0) {
      // A COMMIT that fails leads to another attempt by itself; otherwise the decision stands.
      await Promise.all(decided);
      if (!this.sessions.some((session) => session.hasTold(error))) this.leave(error);
    } else if (this.takes(error)) await this.repeat(error);
    else this.leave(error);
  }

  /** The response has not been begun, or has been taken back. */
  async repeat(error: unknown): Promise<void> {
    // At once: what comes during the ROLLBACK is dropped.
    this.isOver = true;
    await Promise.all(this.sessions.map((session) => session.giveUp(error)));
    this.head.rewind();
    const { task, number } = this;
    // A `pipeline()` leaves listeners on the response up to its end.
    const { res } = task;
    if (res.getMaxListeners() > 0) res.setMaxListeners(res.getMaxListeners() + LISTENERS_OF_AN_ATTEMPT);
    await sleep(Math.random() * Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** number));
    if (isGone(task.req, task.res)) return;
    const sessions = this.sessions.map((session) => session.another());
    new Attempt(task, number + 1, sessions, true).run();
  }

  /** Sessions are read from here, so that a straggler of this attempt never finds that of the next one. */
  private request(): Request {
    const own: Request = Object.create(this.task.req, { [ATTEMPT]: { value: true } });
    for (const session of this.sessions) {
      Object.defineProperty(own, session.mount.options.property, {
        configurable: true,
        enumerable: true,
        get: () => session.opened.scope.face,
        set(value: unknown) {
          Object.defineProperty(own, session.mount.options.property, { configurable: true, enumerable: true, writable: true, value });
        },
      });
    }
    return own;
  }

  /** Drops what comes when the attempt is over. */
  private response(req: Request): Response {
    const methods = new Map<unknown, { original: unknown; own: unknown }>();
    const attempt = this;
    const proxy: Response = new Proxy(this.task.res, {
      get(res, name) {
        if (name === 'req') return req;
        if (attempt.isOver && name in GONE) return GONE[name as string];
        const value: unknown = Reflect.get(res, name, res);
        if (typeof value !== 'function' || isFixed(res, name)) return value;
        // Express's own (sendFile) go on for long, and must go through here; Node's compare `this`, and others have put theirs on the response.
        const isNodes = name in ServerResponse.prototype || Object.hasOwn(res, name);
        let method = methods.get(name);
        if (method?.original !== value) {
          const apply = (original: (...args: any[]) => unknown, _this: unknown, args: unknown[]): unknown => {
            if (attempt.isOver) return name === 'write' ? true : proxy;
            const result = original.apply(isNodes ? res : proxy, args);
            return result === res ? proxy : result;
          };
          // `res.app` is a function, and has properties.
          method = { original: value, own: new Proxy(value as (...args: any[]) => unknown, { apply }) };
          methods.set(name, method);
        }
        return method.own;
      },
      set: (res, name, value) => attempt.isOver || Reflect.set(res, name, value, res),
    });
    return proxy;
  }
}

/** Such a value must be shown as it is. */
function isFixed(res: Response, name: string | symbol): boolean {
  const own = Reflect.getOwnPropertyDescriptor(res, name);
  return own !== undefined && own.configurable === false && own.writable === false;
}

/** Marks the request that an attempt sees. */
const ATTEMPT = Symbol.for('express-knex-session.attempt');

async function callAsync(call: () => unknown): Promise<unknown> {
  return call();
}

/** How a response looks to an attempt that is over. */
const GONE: Readonly<Record<string, unknown>> = { headersSent: true, writableEnded: true, writableFinished: true, destroyed: true };

const LISTENERS_OF_AN_ATTEMPT = 10;
const FIRST_PAUSE_MS = 10;
const LONGEST_PAUSE_MS = 500;
