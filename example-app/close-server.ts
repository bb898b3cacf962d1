import { once } from 'node:events';
import type { Server } from 'node:http';
import { setTimeout as delay } from 'node:timers/promises';
import type { SessionMiddleware } from 'express-knex-session';

/**
 * Stops serving: no acknowledged request is lost, and none is half done.
 *
 * 1. No new connection is accepted. A request that still comes on an open one is refused with 503 at its first statement.
 * 2. Requests in flight have `drainMs` to end. Those left are rolled back, and answered with 503.
 * 3. Responses on their way to slow readers have `lingerMs` to arrive, and are cut then.
 */
export async function closeServer(server: Server, sessions: SessionMiddleware, { drainMs = 3_000, lingerMs = 1_000 } = {}): Promise<void> {
  const closed = once(server, 'close');
  server.close();
  // close() has ended the connections that were idle. The others must not be kept alive: neither after the response that is
  // under way, nor, if the client is faster, after one more. (closeIdleConnections() would cut responses that are still being sent.)
  server.keepAliveTimeout = 1;
  server.prependListener('request', (_req, res) => res.setHeader('Connection', 'close'));

  await sessions.drain(drainMs);
  await Promise.race([closed, delay(lingerMs, undefined, { ref: false })]);
  server.closeAllConnections();
}
