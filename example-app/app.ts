import express, { type Express, type RequestHandler } from 'express';
import { type SessionMiddleware, scopedSession, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { Journal, type Transfer } from './journal';
import { createLive } from './live';
import { demos } from './live/demos';
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
  /** When the server begins to stop: ends what has no end of its own, so that nobody waits for it. */
  endStreams(): void;
}

interface Outlets {
  /** Gets the errors that are the server's fault. */
  logError?: (error: unknown) => void;
  /** Gets each transfer that is stored: where mails would be sent, or other services told. */
  notify?: (transfer: Transfer) => unknown;
  /** Makes what answers `/metrics`: see metrics.ts. */
  metrics?: (sessions: SessionMiddleware) => RequestHandler;
}

/** The ledger as an Express app; server.ts makes it listen. */
export function createApp(knex: Knex, { logError = console.error, notify = () => {}, metrics }: Outlets = {}): Ledger {
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

  const live = createLive(knex, sessions);
  const journal = new Journal(scopedSession(knex));

  if (metrics) app.get('/metrics', metrics(sessions));
  app.use(live.page);
  app.use(requestId);
  app.use(live.follow);
  app.use(express.json({ limit: '10kb' }), onlyJson);
  app.use(sessions);

  app.use('/health', health(sessions));
  app.use('/accounts', accounts, statement);
  app.use('/transfers', transfers(journal, notify));
  app.use('/live/demo', demos(journal));
  app.use(notFound);

  app.use(sessionErrorHandler()); // Rolls back, so that whatever answers the error finds the transaction ended.
  app.use(problemHandler(logError));
  return { app, sessions, endStreams: live.close };
}
