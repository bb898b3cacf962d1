import { Router } from 'express';
import type { SessionMiddleware } from 'express-knex-session';

/**
 * Whether the process answers, and how its sessions stand. It does not use one itself, so it takes no connection and works without a
 * database.
 */
export function health(sessions: SessionMiddleware): Router {
  const health = Router();
  health.get('/', (_req, res) => {
    res.json({ status: 'ok', sessions: sessions.stats() });
  });
  return health;
}
