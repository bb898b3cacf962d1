import type { Request, Response } from 'express';
import { ownerOf } from './knex-face';
import type { RequestSession } from './request-session';

/**
 * Where sessions may be attached, by any copy of this package.
 */
const REGISTRY = Symbol.for('express-knex-session.registry');
const shared = globalThis as { [REGISTRY]?: { properties: Set<string> } };
shared[REGISTRY] ??= { properties: new Set() };
const { properties } = shared[REGISTRY];

/** On a response: the sessions that have been used for it. */
const USED = Symbol.for('express-knex-session.used');
type Used = Response & { [USED]?: RequestSession[] };

/** Sessions behind a getter: their Knex has not been chosen yet. */
const unopened = new WeakMap<() => unknown, RequestSession>();
let mayBeUnopened = false;

/** Makes a property known, when its middleware is made. */
export function registerProperty(property: string): void {
  properties.add(property);
}

/** Puts a session on its request; one whose Knex is chosen when it is first asked for. */
export function attach(session: RequestSession, req: Request): void {
  const { property } = session.mount.options;
  if (session.isOpen) {
    (req as unknown as Record<string, unknown>)[property] = session.scope.face;
    return;
  }
  const setTo = (value: unknown): void => {
    Object.defineProperty(req, property, { configurable: true, enumerable: true, writable: true, value });
  };
  const get = (): unknown => {
    const { face } = session.opened.scope;
    setTo(face);
    return face;
  };
  mayBeUnopened = true;
  unopened.set(get, session);
  Object.defineProperty(req, property, { configurable: true, enumerable: true, get, set: setTo });
}

/** Puts another session in the place of one. */
export function replace(session: RequestSession, other: RequestSession, req: Request, res: Response): void {
  (res as Used)[USED] = (res as Used)[USED]?.filter((known) => known !== session) ?? [];
  delete (req as unknown as Record<string, unknown>)[session.mount.options.property];
  attach(other, req);
}

/** A session whose Knex has not been chosen yet. Not by asking for it, which would choose. */
export function unopenedAt(req: Request, property: string): RequestSession | undefined {
  if (!mayBeUnopened) return undefined;
  const get = Object.getOwnPropertyDescriptor(req, property)?.get;
  return get && unopened.get(get);
}

export function noteUsed(session: RequestSession, res: Response): void {
  const used = (res as Used)[USED];
  if (used) used.push(session);
  else (res as Used)[USED] = [session];
}

/** Those that are on a request now. */
export function sessionsOn(req: Request): RequestSession[] {
  const sessions: RequestSession[] = [];
  for (const property of properties) {
    const owner = unopenedAt(req, property) ?? ownerOf((req as unknown as Record<string, unknown>)[property]);
    if (owner && 'mount' in owner) sessions.push(owner as RequestSession);
  }
  return sessions;
}

/** All sessions of a request: those that have been used, wherever they are now, and those that are attached to it. */
export function sessionsOf(req: Request, res: Response): RequestSession[] {
  return [...new Set([...((res as Used)[USED] ?? []), ...sessionsOn(req)])];
}
