/* The app without the package, and with a middleware that does nothing. */
import express from 'express';
import { listen } from './listen.mjs';

/** @param {{ middleware: 'none' | 'nothing' }} settings */
export function start({ middleware }) {
  const app = express();
  if (middleware === 'nothing') app.use((_req, _res, next) => next());
  app.get('/untouched', (_req, res) => {
    res.json({ ok: true });
  });
  return listen(app, async () => {});
}
