import { AsyncLocalStorage, AsyncResource } from 'node:async_hooks';
import type { EventEmitter } from 'node:events';
import type { Request } from 'express';
import type { Knex } from 'knex';
import type { Session } from './session';

/** What the running code works for: a request, whose sessions are found on it, or a unit of work outside of one. */
interface Running {
  readonly req: Request | undefined;
  readonly unit: Unit | undefined;
}

export interface Unit {
  readonly knex: Knex;
  readonly isChosen: boolean;
  readonly session: Session;
  /** The one around it. */
  readonly outer: Unit | undefined;
}

/** Shared by all copies of this package. */
interface Context {
  readonly storage: AsyncLocalStorage<Running>;
  isInUse: boolean;
  /** Whether an application has asked for it: outside of production requests are in context anyhow. */
  isWanted: boolean;
}

const SHARED = Symbol.for('express-knex-session.context');
const shared = globalThis as { [SHARED]?: Context };
shared[SHARED] ??= { storage: new AsyncLocalStorage(), isInUse: false, isWanted: false };
const context = shared[SHARED];

/** As long as no middleware keeps sessions in context, it costs nothing. */
export function useContext({ isWanted = true } = {}): void {
  context.isInUse = true;
  context.isWanted ||= isWanted;
}

export function runInContext<T>(req: Request, call: () => T): T {
  return context.storage.run({ req, unit: undefined }, call);
}

/** Costs nothing as long as nobody asks for the context. */
export function runUnitInContext<T>(unit: Omit<Unit, 'outer'>, call: () => T): T {
  if (!context.isWanted) return call();
  const around = context.storage.getStore();
  return context.storage.run({ req: around?.req, unit: { ...unit, outer: around?.unit } }, call);
}

/** The request that the running code works for. */
export function requestInContext(): Request | undefined {
  return context.storage.getStore()?.req;
}

export function unitInContext(): Unit | undefined {
  return context.storage.getStore()?.unit;
}

/**
 * Runs what opens connections in no request's context: the driver calls back in the context in which a connection was opened, and another
 * request may have borrowed it by then.
 */
export function outsideOfContext<T>(call: () => T): T {
  return context.isInUse ? context.storage.exit(call) : call();
}

/**
 * Lets the listeners of an emitter run in this context: those of a stream of rows would run in that of its connection, and those of a
 * request in none.
 */
export function bindToContext(emitter: EventEmitter): void {
  if (!context.isInUse) return;
  const { emit } = emitter;
  const resource = new AsyncResource('express-knex-session.emitter');
  emitter.emit = (...args: Parameters<typeof emit>) => resource.runInAsyncScope(emit, emitter, ...args);
}
