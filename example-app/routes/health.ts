import { Router } from 'express';

export const health = Router();

/** Whether the process answers: it does not use the session, so it takes no connection and works without a database. */
health.get('/', (_req, res) => {
  res.json({ status: 'ok' });
});
