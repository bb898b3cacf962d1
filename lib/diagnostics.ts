import type { Request, Response } from 'express';
import type { Knex } from 'knex';
import { requestInContext } from './context';
import { routeOf } from './describe';
import { stackOfCaller } from './origin';
import { optionDefinitions } from './resolve-options';

/** Mistakes that show only under load, or as lost data. Told early, outside of production. */
type WarningCode = 'ROOT_KNEX_IN_REQUEST' | 'WRITES_ROLLED_BACK' | 'BODY_STILL_ARRIVING';

/** Whether they are told at all; decided when a middleware is made. Tests do on purpose what is a mistake elsewhere; Express is silent there too. */
export function isDevelopment(): boolean {
  const { NODE_ENV: environment } = process.env;
  return environment !== 'production' && environment !== 'test';
}

/** Places that have been told of, as many as are worth remembering. */
const told = new Set<string>();
const MOST_PLACES = 1_000;

/** Tells once for each place, by Node's own channel for warnings. @param place the route, unless another one is given */
function warn(code: WarningCode, req: Request, message: string, detail?: string): void {
  const route = routeOf(req);
  const place = `${code} ${detail ? placeIn(detail) : route}`;
  if (told.has(place) || told.size >= MOST_PLACES) return;
  told.add(place);
  process.emitWarning(`${route} ${message}`, { type: 'SessionWarning', code: `EXPRESS_KNEX_SESSION_${code}`, ...(detail && { detail }) });
}

const watched = new WeakSet<object>();

/**
 * Watches the pool of a Knex instance for connections that a request takes beside its session's.
 *
 * @param holdsConnection whether a request has a session on this pool that holds one
 */
export function watchPool(knex: Knex, holdsConnection: (req: Request, knex: Knex) => boolean): void {
  const { pool } = knex.client as { pool?: { on?(event: 'acquireRequest', listener: () => void): unknown } };
  // Not tarn's: a pg.Pool does not tell who asks.
  if (typeof pool?.on !== 'function' || knex.client.config.connectionPool || watched.has(pool)) return;
  watched.add(pool);
  // A session takes its own connection outside of any context.
  const offender = (): Request | undefined => {
    const req = requestInContext();
    return req && holdsConnection(req, knex) ? req : undefined;
  };
  const origins = rememberOrigins(knex.client, offender);
  pool.on('acquireRequest', () => {
    const req = offender();
    if (req) warn('ROOT_KNEX_IN_REQUEST', req, ROOT_KNEX_IN_REQUEST, origins.get(req));
  });
}

/** Where a request has made its last statement on the root knex: when it is awaited, the caller is not on the stack any more. */
function rememberOrigins(client: Knex.Client, offender: () => Request | undefined): WeakMap<Request, string> {
  const origins = new WeakMap<Request, string>();
  const makers = client as unknown as Record<string, (...args: unknown[]) => unknown>;
  for (const name of ['queryBuilder', 'raw', 'schemaBuilder', 'transaction']) {
    const make = makers[name];
    if (!make) continue;
    makers[name] = function (this: unknown, ...args: unknown[]) {
      const req = this === client ? offender() : undefined;
      if (req) origins.set(req, stackOfCaller());
      return make.apply(this, args);
    };
  }
  return origins;
}

/** The innermost line of the application. */
function placeIn(stack: string): string {
  return stack.split('\n')[0] ?? '';
}

const ROOT_KNEX_IN_REQUEST =
  'ran a statement on the root knex while its session held a connection. The statement is outside of the transaction, and under load the request may ' +
  'wait for a connection that its own kind keeps. Use req.session, or end the session before it.';

/** Tells of a session that has waited, with its connection, for a body that is slow to arrive. */
export function diagnoseBody(req: Request, isConnected: () => boolean): void {
  const hasBody = Number(req.headers['content-length']) > 0 || req.headers['transfer-encoding'] !== undefined;
  if (!hasBody) return;
  const look = (): void => {
    if (!req.complete && !req.destroyed && isConnected()) warn('BODY_STILL_ARRIVING', req, BODY_STILL_ARRIVING);
  };
  setTimeout(look, SLOW_BODY_MS).unref();
}

/** Tells of writes that are lost because of the status of the response. */
export function diagnoseRollback(
  { req, res }: { req: Request; res: Response },
  work: Work,
  { shouldCommit }: { shouldCommit: unknown },
): void {
  const { writes = 0, rollbackOnly, isSettled } = work;
  const isByStatus = res.statusCode >= 400 && shouldCommit === optionDefinitions.shouldCommit.default;
  if (writes > 0 && isByStatus && !rollbackOnly && !isSettled) warn('WRITES_ROLLED_BACK', req, writesRolledBack(writes, res.statusCode));
}

interface Work {
  readonly writes: number | undefined;
  readonly rollbackOnly: unknown;
  readonly isSettled: boolean;
}

/** A body that takes longer than this has been waited for. */
const SLOW_BODY_MS = 100;

const BODY_STILL_ARRIVING =
  "has opened its session while the request's body was still arriving: a slow upload keeps a connection for as long as it takes. " +
  'Parse the body before the first statement, or authenticate in a withSession() of its own.';

function writesRolledBack(writes: number, status: number): string {
  const what = writes === 1 ? '1 write' : `${writes} writes`;
  return (
    `rolled back ${what} because of ${status}: commit first if they must stay (await req.session.commit()); ` +
    'say so if they must not (req.session.setRollbackOnly()).'
  );
}
