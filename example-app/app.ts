import express, { type Express } from 'express';
import { type SessionMiddleware, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { notFound, problemHandler } from './problem-handler';
import { accounts } from './routes/accounts';
import { health } from './routes/health';
import { statement } from './routes/statement';
import { transfers } from './routes/transfers';

export interface Ledger {
  app: Express;
  /** To drain them before the app ends. */
  sessions: SessionMiddleware;
}

/** The ledger as an Express app; server.ts makes it listen. `logError` gets the errors that are the server's fault. */
export function createApp(knex: Knex, logError: (error: unknown) => void = console.error): Ledger {
  const app = express();
  app.disable('x-powered-by');
  app.set('json replacer', (_key: string, value: unknown) => (typeof value === 'bigint' ? value.toString() : value));

  // No connection yet: a request takes one with its first statement.
  const sessions = sessionMiddleware(knex, {
    acquireTimeout: 3_000,
    // Rows that move extend it: for a statement, it is how long the reader may pause.
    transactionTimeout: (req) => (req.path.endsWith('/statement.csv') ? 60_000 : 10_000),
    settleTimeout: 3_000,
    onError: logError,
  });

  app.use(express.json({ limit: '10kb' }));
  app.use(sessions);

  app.use('/health', health(sessions));
  app.use('/accounts', accounts, statement);
  app.use('/transfers', transfers);
  app.use(notFound);

  app.use(sessionErrorHandler()); // Rolls back, so that whatever answers the error finds the transaction ended.
  app.use(problemHandler(logError));
  return { app, sessions };
}
