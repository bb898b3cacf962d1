import express, { type RequestHandler } from 'express';
import { type SessionOptions, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { type Answer, get, type Listening, listen } from './http';
import type { PooledDatabase } from './pgbouncer';
import { eventually, poolUsage } from './pool';

/** An app until the end of the test. */
export async function withApp(
  knex: Knex,
  options: SessionOptions,
  handler: RequestHandler,
  test: (app: Listening & { errors: any[] }) => Promise<void>,
): Promise<void> {
  const errors: any[] = [];
  const app = express().use(sessionMiddleware(knex, options), handler, sessionErrorHandler());
  const answerError: express.ErrorRequestHandler = (error, _req, res, next) => {
    errors.push(error);
    if (res.headersSent) return next(error);
    res.status(error.status ?? 500).json({ code: error.code });
  };
  const listening = await listen(app.use(answerError));
  try {
    await test(Object.assign(listening, { errors }));
  } finally {
    await listening.close();
  }
}

export const ask = (url: string): Promise<Answer> => get(url, { signal: AbortSignal.timeout(10_000) });

/** Whatever happened before: PgBouncer lives, nothing runs, and the next request is served. */
export async function isSound({ pooler, knex, busyBackends, database }: PooledDatabase): Promise<void> {
  await eventually(async () => expect(await busyBackends()).toEqual([]));
  await eventually(() => expect(poolUsage(knex)).toMatchObject({ used: 0, pendingAcquires: 0 }));
  expect(await withSession(knex, (session) => session('notes').insert({ id: 'next' }).returning('id'))).toEqual([{ id: 'next' }]);
  expect(await database.admin('notes').where({ id: 'next' }).del()).toBe(1);
  expect({ isAlive: pooler.isAlive(), fatal: pooler.lines.filter((line) => line.includes('FATAL')) }).toEqual({ isAlive: true, fatal: [] });
}
