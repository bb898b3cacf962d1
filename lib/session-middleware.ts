import type { IncomingMessage } from 'node:http';
import type { NextFunction, Request } from 'express';
import type { Knex } from 'knex';
import { assertKnex } from './assert-knex';
import { attach, registerProperty, unopenedAt } from './attached-sessions';
import { bindToContext, runInContext, useContext } from './context';
import { isDevelopment } from './diagnostics';
import { SessionError } from './errors';
import type { AnyRequest, AnyResponse, RouteMiddleware } from './express';
import { isSession, ownerOf } from './knex-face';
import type { Mount } from './mounted-session';
import { shareShapes } from './object-shape';
import { OpenSessions, type SessionStats } from './open-sessions';
import type { SessionOptions } from './options';
import { RequestSession } from './request-session';
import { resolveOptions, sameOptions } from './resolve-options';
import { earlyHeaders } from './response-head';
import type { Session } from './session';
import { SessionPolicy } from './session-policy';
import type { TransactionOwner } from './transaction-owner';

/**
 * What {@link sessionMiddleware} returns: a request handler that also knows its sessions.
 *
 * @example
 * const sessions: SessionMiddleware = sessionMiddleware(knex);
 * app.use(sessions);
 */
export interface SessionMiddleware extends RouteMiddleware {
  /**
   * Ends the sessions, for the shutdown of the application. Stop accepting connections first (`server.close()`).
   *
   * 1. From now on a first statement is refused: `ERR_SESSION_UNAVAILABLE` (503).
   * 2. Resolves when no session holds a connection or waits for one any more. The last responses may still be on their way.
   * 3. Those that are left after `ms` are interrupted: the running statement is cancelled, the work is rolled back, the client gets
   *    `ERR_SESSION_UNAVAILABLE`. A COMMIT that is under way is left to finish. Together it takes `ms` and `settleTimeout` at most.
   *
   * @param ms how long to wait for the open sessions, in milliseconds; 0 interrupts them at once
   * @throws TypeError if `ms` is no such number
   * @example
   * process.once('SIGTERM', async () => {
   *   const closed = once(server.close(), 'close');
   *   await sessions.drain(3_000);
   *   await Promise.race([closed, delay(1_000)]); // slow readers
   *   server.closeAllConnections();
   *   await knex.destroy();
   * });
   */
  drain(ms: number): Promise<void>;

  /**
   * How many sessions are open or waiting now, and how the others have ended.
   *
   * @example
   * app.get('/metrics', (req, res) => res.json(sessions.stats()));
   */
  stats(): SessionStats;
}

/**
 * Gives each request a database session: a Knex transaction on `req.session`.
 *
 * 1. Nothing happens until the handler runs a statement: no connection, no SQL, and the response is not wrapped.
 * 2. The first statement takes a connection and begins; all statements of the request run in that transaction.
 * 3. A response with a status below 400 leaves after COMMIT has succeeded; any other after ROLLBACK.
 * 4. If COMMIT fails, the error goes to the application's error handlers, and what the handler had prepared is discarded.
 * 5. If the client disconnects before the response ends, the running statement is cancelled and the session is rolled back.
 * 6. Every wait has its limit: for a connection, of an open transaction, for COMMIT and ROLLBACK.
 * 7. The connection goes back to the pool before the response leaves.
 *
 * Mount {@link sessionErrorHandler} after the routes.
 *
 * @param knex a Knex instance with `client: 'pg'`; or a `Knex.Transaction`, and then each session is a savepoint in it; or a function
 *   that chooses one for a request (a replica, a tenant's database), asked when the session is first touched
 * @throws TypeError at construction, for a `knex` or an option that is not what it should be
 * @example
 * app.use(sessionMiddleware(knex));
 *
 * app.post('/transfers', async (req, res) => {
 *   await req.session('entries').insert(debit);
 *   await req.session('entries').insert(credit);
 *   res.status(201).end();
 * });
 *
 * app.use(sessionErrorHandler());
 */
export function sessionMiddleware(knex: Knex | ((req: Request) => Knex), options?: SessionOptions): SessionMiddleware {
  const choose = chooserIn(knex);
  if (!choose) assertKnex(knex);
  const openSessions = new OpenSessions();
  const resolved = resolveOptions(options, { of: 'sessionMiddleware()' });
  const mount: Mount = {
    knex: choose ? undefined : (knex as Knex),
    choose,
    options: resolved,
    policy: new SessionPolicy(resolved),
    openSessions,
    isDiagnosing: isDevelopment(),
  };
  const { property, context } = mount.options;
  const hasContext = context || mount.isDiagnosing;
  registerProperty(property);
  if (hasContext) useContext({ isWanted: context });

  return Object.assign(sessionMiddlewareHandler, {
    drain: (ms: number) => openSessions.drain(ms),
    stats: () => openSessions.stats(),
  });

  function sessionMiddlewareHandler(req: AnyRequest, res: AnyResponse, next: NextFunction): void {
    // Its responses cannot be taken back as those of HTTP/1 can: Node's own class for them keeps the status and the head to itself.
    if (req.httpVersionMajor > 1) {
      next(new TypeError(HTTP_1_ONLY));
      return;
    }
    const holder = req as unknown as Record<string, unknown>;
    // Not by asking for it: that would choose its Knex.
    const unopened = unopenedAt(req, property);
    if (unopened) {
      next(whyRefused(mount, unopened));
      return;
    }
    const taken = holder[property];
    if (taken !== undefined && taken !== null) {
      next(whyRefused(mount, ownerOf(taken)));
      return;
    }
    shareShapes(req, res);
    const session = new RequestSession(mount, { req, res, next, earlyHeaders: earlyHeaders(res) });
    attach(session, req);
    if (hasContext) {
      runInContext(req, () => {
        // Listeners of a body that arrives, or of a response that ends.
        if (context) for (const emitter of [req, res]) bindToContext(emitter);
        next();
      });
    } else next();
  }
}

/**
 * The session of a request, for code that is handed a request of any kind.
 *
 * 1. Types cannot see whether the middleware is mounted; this looks.
 * 2. It takes no connection: that comes with the first statement.
 *
 * @param property where the middleware attached it
 * @default 'session'
 * @throws SessionError `ERR_SESSION_MISSING` if there is none: the middleware is not mounted before this route
 * @example
 * const session = getSession(req);
 */
export function getSession(req: IncomingMessage, property = 'session'): Session {
  const session = (req as unknown as Record<string, unknown> | undefined)?.[property];
  if (isSession(session)) return session;
  const found = session === undefined ? 'nothing' : 'something else (express-session?)';
  throw new SessionError(
    'ERR_SESSION_MISSING',
    `Expected a database session on req.${property}, found ${found}. ` +
      'Mount app.use(sessionMiddleware(knex)) before this route, and ask for the property that it was given.',
  );
}

const HTTP_1_ONLY =
  'A request came by HTTP/2, which Express does not support, nor does sessionMiddleware. ' +
  'Let a proxy (nginx, a load balancer) speak HTTP/2 to the clients and HTTP/1.1 to this app, or use withSession(knex, work) in such a route.';

/** A function that chooses, and neither a Knex instance nor the function that makes them. */
function chooserIn(knex: unknown): ((req: Request) => Knex) | undefined {
  if (typeof knex !== 'function' || knex.length > 1 || 'client' in knex || 'Client' in knex || 'context' in knex) return undefined;
  return knex as (req: Request) => Knex;
}

/** A second middleware finds the session of the first: that one owns it, if they agree. */
function whyRefused(mount: Mount, session: TransactionOwner | undefined): TypeError | undefined {
  const { property } = mount.options;
  if (session && 'mount' in session) {
    const { knex, choose, options } = (session as RequestSession).mount;
    if (knex === mount.knex && choose === mount.choose && sameOptions(options, mount.options)) return undefined;
    return new TypeError(
      `sessionMiddleware is mounted twice with the property '${property}' and another Knex instance or other options. ` +
        "Mount it once, or give the second one a property of its own: { property: 'other' }.",
    );
  }
  const [owner, other] = property === 'session' ? [' (express-session?)', 'db'] : ['', 'other'];
  return new TypeError(
    `req.${property} is already set${owner}. Attach the database session elsewhere: sessionMiddleware(knex, { property: '${other}' }).`,
  );
}
