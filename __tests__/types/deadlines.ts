// Deadlines, interruptions and the end of an app.
import express, { type RequestHandler } from 'express';
import {
  isRetryable,
  type OnDisconnect,
  type PerRequest,
  type SessionMiddleware,
  type SessionStats,
  SessionTimeoutError,
  sessionMiddleware,
  type WithSessionOptions,
  withSession,
} from 'express-knex-session';
import createKnex from 'knex';
import type { Equal, Expect } from './equal.js';

const knex = createKnex({ client: 'pg' });
const app = express();

// A handler as any other, which knows more.
const sessions = sessionMiddleware(knex, { transactionTimeout: 10_000 });
type _sessions = Expect<Equal<typeof sessions, SessionMiddleware>>;
const handler: RequestHandler = sessions;
app.use(handler);
app.get('/', sessions, (_req, res) => res.end());

export async function shutDown(): Promise<void> {
  type _drained = Expect<Equal<ReturnType<typeof sessions.drain>, Promise<void>>>;
  await sessions.drain(10_000);
  // @ts-expect-error: without a limit, it might wait for ever
  await sessions.drain();
  // @ts-expect-error: milliseconds
  await sessions.drain('10s');
  const { open, waiting, committed, rolledBack, unknown } = sessions.stats();
  const sum: number = open + waiting + committed + rolledBack + unknown;
  console.log(sum);
  const stats: SessionStats = sessions.stats();
  // @ts-expect-error: tells, is not told
  stats.open = 0;
}

app.get('/signal', async (req, res) => {
  type _signal = Expect<Equal<typeof req.session.signal, AbortSignal>>;
  // @ts-expect-error: tells, is not told
  req.session.signal = new AbortController().signal;
  const rates = await fetch('https://example.org', { signal: req.session.signal });
  req.session.signal.addEventListener('abort', () => {
    if (req.session.signal.reason instanceof SessionTimeoutError) console.error(req.session.signal.reason.status);
  });
  res.json(await rates.json());
});

// Limits: a value, a value for each request, or none.
sessionMiddleware(knex, { acquireTimeout: 1_000, transactionTimeout: 0, settleTimeout: undefined });
sessionMiddleware(knex, {
  acquireTimeout: (req) => (req.path === '/' ? 1_000 : 5_000),
  transactionTimeout: (req) => (req.method === 'GET' ? 0 : 5_000),
  settleTimeout: () => 1_000,
  onDisconnect: (req) => (req.method === 'GET' ? 'rollback' : 'finish'),
});
const limit: PerRequest<number> = (req) => req.url.length;
sessionMiddleware(knex, { acquireTimeout: limit });
for (const onDisconnect of ['rollback', 'finish'] satisfies OnDisconnect[]) sessionMiddleware(knex, { onDisconnect });

// @ts-expect-error: milliseconds
sessionMiddleware(knex, { acquireTimeout: '5s' });
// @ts-expect-error: at once
sessionMiddleware(knex, { transactionTimeout: async () => 5_000 });
// @ts-expect-error: not null
sessionMiddleware(knex, { settleTimeout: null });
// @ts-expect-error: no such thing
sessionMiddleware(knex, { onDisconnect: 'commit' });
// @ts-expect-error: misspelt
sessionMiddleware(knex, { transactionTimeOut: 5_000 });

const jobLimits: WithSessionOptions = { acquireTimeout: 1_000, transactionTimeout: 0, settleTimeout: 1_000, onError: () => {} };
withSession(knex, async (session) => session.signal.throwIfAborted(), jobLimits);
withSession(knex, async () => {}, { transactionTimeout: undefined });
// @ts-expect-error: it has no request
withSession(knex, async () => {}, { transactionTimeout: () => 5_000 });
// @ts-expect-error: it has no client
withSession(knex, async () => {}, { onDisconnect: 'finish' });

export const retried = (error: unknown, again: () => void): void => {
  const answer = isRetryable(error);
  type _answer = Expect<Equal<typeof answer, boolean>>;
  if (answer) again();
};
// @ts-expect-error: an error
isRetryable();
