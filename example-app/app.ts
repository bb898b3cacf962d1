import express, { type Express } from 'express';
import { type SessionMiddleware, scopedSession, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { Journal, type Transfer } from './journal';
import { notFound, problemHandler } from './problem-handler';
import { requestId } from './request-id';
import { accounts } from './routes/accounts';
import { health } from './routes/health';
import { statement } from './routes/statement';
import { transfers } from './routes/transfers';
import { onlyJson } from './validation';

export interface Ledger {
  app: Express;
  /** To drain them before the app ends. */
  sessions: SessionMiddleware;
}

interface Outlets {
  /** Gets the errors that are the server's fault. */
  logError?: (error: unknown) => void;
  /** Gets each transfer that is stored: where mails would be sent, or other services told. */
  notify?: (transfer: Transfer) => unknown;
}

/** The ledger as an Express app; server.ts makes it listen. */
export function createApp(knex: Knex, { logError = console.error, notify = () => {} }: Outlets = {}): Ledger {
  const app = express();
  app.disable('x-powered-by');
  app.set('json replacer', (_key: string, value: unknown) => (typeof value === 'bigint' ? value.toString() : value));

  // No connection yet: a request takes one with its first statement.
  const sessions = sessionMiddleware(knex, {
    readOnly: ({ method }) => method === 'GET' || method === 'HEAD',
    settings: (req) => ({ 'app.request_id': req.id }),
    context: true, // For the journal, which has no `req`.
    acquireTimeout: 3_000,
    // Rows that move extend it: for a statement, it is how long the reader may pause.
    transactionTimeout: (req) => (req.path.endsWith('/statement.csv') ? 60_000 : 10_000),
    settleTimeout: 3_000,
    onError: logError,
  });

  app.use(requestId);
  app.use(express.json({ limit: '10kb' }), onlyJson);
  app.use(sessions);

  app.use('/health', health(sessions));
  app.use('/accounts', accounts, statement);
  app.use('/transfers', transfers(new Journal(scopedSession(knex)), notify));
  app.use(notFound);

  app.use(sessionErrorHandler()); // Rolls back, so that whatever answers the error finds the transaction ended.
  app.use(problemHandler(logError));
  return { app, sessions };
}
