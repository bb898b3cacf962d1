import { join } from 'node:path';
import { type RequestHandler, Router } from 'express';
import type { SessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { Follower } from './follower';
import { Watchers } from './watchers';

export interface Live {
  /** The page, its files and its events. Mounted before everything else: they need no session. */
  page: RequestHandler;
  /** Sees each request. Mounted before the session, and after the request's id. */
  follow: RequestHandler;
  /** Ends the streams of events, when the server begins to stop. */
  close(): void;
}

const PAGE = join(__dirname, 'page');
const FILES = new Map([
  ['/', 'page.html'],
  ...['page.css', 'timeline.css', 'page.mjs', 'clock.mjs', 'demos.mjs', 'pool.mjs', 'timeline.mjs'].map(
    (name) => [`/live/${name}`, name] as const,
  ),
]);

/** The page that shows what happens to requests while it happens. It costs nothing while nobody has it open. */
export function createLive(knex: Knex, sessions: SessionMiddleware): Live {
  const follower = new Follower((request) => watchers.tell('request', request));
  const watchers = new Watchers({
    onFirst: () => follower.start(),
    onLast: () => follower.stop(),
    hello: () => ({
      at: performance.now(),
      poolSize: knex.client.config.pool?.max ?? 10,
      sessions: sessions.stats(),
      requests: follower.requestsUnderWay(),
    }),
  });

  const page = Router({ caseSensitive: true, strict: true });
  // A HEAD would never end.
  page.get('/live/events', (req, res, next) => (req.method === 'GET' ? watchers.add(req, res) : next()));
  page.get([...FILES.keys()], (req, res) => {
    res.set({ 'Cache-Control': 'no-store', 'Content-Security-Policy': "default-src 'self'; img-src 'self' data:" });
    res.sendFile(FILES.get(req.path) as string, { root: PAGE, cacheControl: false });
  });
  return { page, follow: follower.middleware, close: () => watchers.close() };
}
