// What a request's session may be told: modes, settings, hooks, another attempt; and how it is reached without the request.
import express, { type RequestHandler } from 'express';
import {
  currentSession,
  type IsolationLevel,
  type PerRequest,
  type RetryableOptions,
  retryable,
  type ScopedSessionOptions,
  type Session,
  type SessionOptions,
  type Settings,
  scopedSession,
  sessionMiddleware,
  sessionOptions,
  type WithSessionOptions,
  withSession,
} from 'express-knex-session';
import createKnex, { type Knex } from 'knex';
import type { Equal, Expect } from './equal.js';

const knex = createKnex({ client: 'pg' });
const replica = createKnex({ client: 'pg' });
const app = express();

// Values, functions of the request, or nothing.
const modes: SessionOptions = { isolationLevel: 'repeatable read', readOnly: true, deferrable: false, transaction: true, context: true };
sessionMiddleware(knex, modes);
sessionMiddleware(knex, { isolationLevel: undefined, settings: undefined, role: undefined, context: undefined });
sessionMiddleware(knex, {
  isolationLevel: (req) => (req.method === 'POST' ? 'serializable' : undefined),
  readOnly: (req) => req.method === 'GET',
  settings: (req) => ({ 'app.url': req.url, 'app.depth': 1, 'app.on': true }),
  role: (req) => (req.secure ? 'app_user' : 'app_anonymous'),
  transaction: () => false,
});
const level: PerRequest<IsolationLevel | undefined> = 'read uncommitted';
const settings: Settings = { 'app.tenant': 7 };
sessionMiddleware(knex, { isolationLevel: level, settings });
sessionMiddleware((req) => (req.method === 'GET' ? replica : knex), modes);
// @ts-expect-error: at once
sessionMiddleware(async () => knex);
// @ts-expect-error: no such level
sessionMiddleware(knex, { isolationLevel: 'snapshot' });
// @ts-expect-error: nobody would see what it is
sessionMiddleware(knex, { settings: { 'app.tenant': undefined } });
// @ts-expect-error: at once
sessionMiddleware(knex, { settings: async () => ({ 'app.tenant': 7 }) });
// @ts-expect-error: a list is no value
sessionMiddleware(knex, { settings: { search_path: ['a', 'b'] } });
// @ts-expect-error: for all requests or none
sessionMiddleware(knex, { context: () => true });
// @ts-expect-error: true or false
sessionMiddleware(knex, { readOnly: 'yes' });

// For a route, in the midst of handlers whose requests stay typed.
export const forRoute: RequestHandler = sessionOptions({ isolationLevel: 'serializable', property: 'db' });
// @ts-expect-error: none of them
sessionOptions();
// @ts-expect-error: misspelt
sessionOptions({ readonly: true });
interface Body {
  amount: number;
}
app.post(
  '/accounts/:id',
  sessionOptions({ transaction: false }),
  retryable<RequestHandler<{ id: string }, { id: string }, Body>>(async (req, res, next) => {
    type _id = Expect<Equal<typeof req.params.id, string>>;
    type _amount = Expect<Equal<typeof req.body.amount, number>>;
    type _session = Expect<Equal<typeof req.session, Session>>;
    if (req.body.amount < 0) return next('route');
    res.json({ id: req.params.id });
  }),
);
const attempts: RetryableOptions = { attempts: undefined };
const transfer: RequestHandler<{ id: string }> = async (_req, res) => void res.end();
const again = retryable(transfer, attempts);
type _again = Expect<Equal<typeof again, RequestHandler<{ id: string }>>>;
// @ts-expect-error: a number
retryable(transfer, { attempts: '3' });
// @ts-expect-error: a handler
retryable('/accounts');
// @ts-expect-error: misspelt
retryable(transfer, { attemps: 3 });

app.post('/orders', async (req, res) => {
  await req.session.set({ 'app.user': 1 });
  // @ts-expect-error: no value
  await req.session.set({ 'app.user': null });
  const stored = req.session.checkpoint();
  type _stored = Expect<Equal<typeof stored, Promise<void>>>;
  await stored;
  req.session.beforeCommit(async (session) => {
    type _session = Expect<Equal<typeof session, Session>>;
    await session('audit').insert({ url: req.url });
  });
  req.session.afterCommit(() => console.log('stored'));
  req.session.afterRollback((session) => session('failed').insert({ url: req.url }));
  await req.session.transaction(async (savepoint) => {
    const order: Knex.Transaction = savepoint;
    await order('orders').insert({});
  });
  // @ts-expect-error: a function
  req.session.afterCommit('mail');
  res.end();
});

export const db = scopedSession(knex);
type _db = Expect<Equal<typeof db, Knex>>;
const outside: ScopedSessionOptions = { outside: 'autocommit' };
scopedSession(knex, outside);
// @ts-expect-error: throw or autocommit
scopedSession(knex, { outside: 'pool' });
export const audit = async (): Promise<void> => {
  const session = currentSession();
  type _session = Expect<Equal<typeof session, Session>>;
  await currentSession('db')('audit').insert({});
};

const jobModes: WithSessionOptions = { isolationLevel: 'serializable', readOnly: true, deferrable: true, settings, role: 'job' };
withSession(knex, async () => {}, jobModes);
// @ts-expect-error: it has no request
withSession(knex, async () => {}, { settings: () => ({}) });
// @ts-expect-error: it is one
withSession(knex, async () => {}, { transaction: false });
