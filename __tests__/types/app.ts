// What TypeScript makes of an app: `req.session` is typed because one file, this one, imports the package.
import express from 'express';
import { getSession, type Session, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import createKnex, { type Knex } from 'knex';
import type { Equal, Expect } from './equal.js';
import { rename, type User } from './routes.js';

const knex = createKnex({ client: 'pg' });
const app = express();
app.use(sessionMiddleware(knex));
app.use('/api', sessionMiddleware(knex), rename);
express.Router().use(sessionMiddleware(knex)).use(sessionErrorHandler());
app.get('/users', async (req, res) => {
  type _session = Expect<Equal<typeof req.session, Session>>;
  const users: User[] = await req.session<User>('users').where({ id: 1 }).select('*');
  const names = await req.session<User>('users').select('name');
  type _names = Expect<Equal<typeof names, Pick<User, 'name'>[]>>;
  // @ts-expect-error: no such column
  await req.session<User>('users').where({ nme: 'x' });

  // A transaction, to code that wants one.
  const trx: Knex.Transaction = req.session;
  await knex<User>('users').transacting(req.session).insert({ name: 'x' });
  await req.session.transaction(async (savepoint) => savepoint('users').del());
  await req.session.raw('SELECT 1').timeout(100);
  await req.session.schema.hasTable('users');
  for await (const row of req.session('users').stream()) res.write(row);

  // And more than that.
  req.session.setRollbackOnly();
  req.session.setRollbackOnly('dry run');
  type _outcome = Expect<Equal<typeof req.session.outcome, 'unused' | 'open' | 'committed' | 'rolled back' | 'unknown'>>;
  // @ts-expect-error: tells, is not told
  req.session.outcome = 'committed';
  // @ts-expect-error: no login session
  req.session.save();
  // @ts-expect-error: not any
  req.session.noSuchThing;
  // @ts-expect-error: nowhere else
  req.db;
  res.json([users, trx.isCompleted()]);
});
app.use(sessionErrorHandler());

// @ts-expect-error: forgotten call
app.use(sessionMiddleware);
// @ts-expect-error: forgotten call
app.use(sessionErrorHandler);
// @ts-expect-error: the configuration, not an instance
sessionMiddleware({ client: 'pg' });
// @ts-expect-error: a promise of an instance
sessionMiddleware(Promise.resolve(knex));
// @ts-expect-error: it has no options
sessionErrorHandler({ property: 'db' });
knex.transaction(async (trx) => void sessionMiddleware(trx));

// Whatever types an app gives its requests.
interface Params {
  id: string;
}
interface SignedIn extends express.Request {
  user: User;
}
app.get('/users/:id', async (req: express.Request<Params>, res: express.Response<User[], { now: Date }>) => {
  const session: Session = getSession(req);
  const db: Session = getSession(req, 'db');
  res.json(await (req.params.id ? session : db)<User>('users').select('*'));
});
export const nameOf = (req: SignedIn): Promise<User | undefined> => getSession(req)<User>('users').where('id', req.user.id).first();

export async function jobs(): Promise<void> {
  const nothing = await withSession(knex, async () => {});
  type _nothing = Expect<Equal<typeof nothing, void>>;
  const id = await withSession(knex, async (session) => {
    const [user] = await session<User>('users').insert({ name: 'x' }).returning('id');
    return user?.id;
  });
  type _id = Expect<Equal<typeof id, number | undefined>>;
  const atOnce = await withSession(knex, () => 5);
  type _atOnce = Expect<Equal<typeof atOnce, number>>;
  // A query is no promise, but as good as one.
  const users = await withSession(knex, (session) => session<User>('users').select('*'));
  type _users = Expect<Equal<typeof users, User[]>>;
  withSession(
    knex,
    (session) => {
      type _session = Expect<Equal<typeof session, Session>>;
    },
    { onError: (error) => console.error(error) },
  );
  // @ts-expect-error: no work
  withSession(knex);
  // @ts-expect-error: nothing to commit at
  withSession(knex, async () => {}, { commitAt: 'end' });
}
