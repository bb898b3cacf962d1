import express, { type Express } from 'express';
import { sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { notFound, problemHandler } from './problem-handler';
import { accounts } from './routes/accounts';
import { health } from './routes/health';
import { statement } from './routes/statement';
import { transfers } from './routes/transfers';

/** The ledger as an Express app; server.ts makes it listen. `logError` gets the errors that are answered with 500 and up. */
export function createApp(knex: Knex, logError: (error: unknown) => void = console.error): Express {
  const app = express();
  app.disable('x-powered-by');
  app.set('json replacer', (_key: string, value: unknown) => (typeof value === 'bigint' ? value.toString() : value));

  app.use(express.json({ limit: '10kb' }));
  app.use(sessionMiddleware(knex)); // No connection yet: a request takes one with its first statement.

  app.use('/health', health);
  app.use('/accounts', accounts, statement);
  app.use('/transfers', transfers);
  app.use(notFound);

  app.use(sessionErrorHandler()); // Rolls back, so that whatever answers the error finds the transaction ended.
  app.use(problemHandler(logError));
  return app;
}
