// Handlers of every kind, typed by Express's generics, with the session on their requests.
import express, { type ErrorRequestHandler, type Request, type RequestHandler, Router } from 'express';
import { retryable, type Session } from 'express-knex-session';
import type { Equal, Expect } from './equal.js';

interface Account {
  id: number;
  owner: string;
}
interface Params {
  id: string;
}
interface Body {
  amount: number;
}
interface Answer {
  balance: number;
}
interface Page {
  page: string;
}

export const deposit: RequestHandler<Params, Answer, Body, Page, { user: string }> = async (req, res, next) => {
  type _session = Expect<Equal<typeof req.session, Session>>;
  type _id = Expect<Equal<typeof req.params.id, string>>;
  type _amount = Expect<Equal<typeof req.body.amount, number>>;
  type _page = Expect<Equal<typeof req.query.page, string>>;
  const owner = await req.session<Account>('accounts').where('owner', res.locals.user).first('id', 'owner');
  type _owner = Expect<Equal<typeof owner, Pick<Account, 'id' | 'owner'> | undefined>>;
  if (!owner) return next();
  // @ts-expect-error: another answer
  res.json({ total: 1 });
  // @ts-expect-error: no such parameter
  req.params.name;
  res.json({ balance: req.body.amount });
};
export const signedIn: RequestHandler = (req, _res, next) => void req.session.set({ 'app.user': req.ip ?? '' }).then(() => next(), next);
export const logged: ErrorRequestHandler<Params> = (error, req, _res, next) => {
  type _session = Expect<Equal<typeof req.session, Session>>;
  type _id = Expect<Equal<typeof req.params.id, string>>;
  if (req.session.outcome === 'unknown') console.error(error);
  next(error);
};

const app = express();
app.post('/accounts/:id', deposit);
app.use('/accounts/:id', logged);
app.get<Params, Answer, Body>('/accounts/:id', async (req, res) => {
  type _session = Expect<Equal<typeof req.session, Session>>;
  type _params = Expect<Equal<typeof req.params, Params>>;
  // @ts-expect-error: a number
  res.json({ balance: req.params.id });
  res.json({ balance: req.body.amount });
});
app.get('/accounts/:id/owner', async (req, res) => {
  const id: string = req.params.id;
  // @ts-expect-error: no such parameter
  req.params.name;
  res.json(
    await req
      .session<Account>('accounts')
      .where({ id: Number(id) })
      .pluck('owner'),
  );
});
app.param(
  'id',
  (req, _res, next, id: string) =>
    void req
      .session('accounts')
      .where({ id })
      .then(() => next(), next),
);

const router = Router({ mergeParams: true });
router.use((req, _res, next) => {
  req.session.beforeCommit(() => {});
  next();
});
router.route('/:id').post(deposit).put(retryable(deposit));
router.get('/:id', (req: Request<Params>, res) => void res.json(req.session.outcome));
app.use('/accounts', signedIn, router);

// A savepoint is a session, too.
export async function inSavepoints(session: Session): Promise<string> {
  const done = await session.transaction(async (savepoint) => {
    type _savepoint = Expect<Equal<typeof savepoint, Session>>;
    savepoint.afterCommit((own) => own('audit').insert({}));
    return 'done';
  });
  type _done = Expect<Equal<typeof done, string>>;
  const byHand = await session.transaction();
  type _byHand = Expect<Equal<typeof byHand, Session>>;
  await byHand.commit();
  const strict = await session.transaction(null, { readOnly: true });
  type _strict = Expect<Equal<typeof strict, Session>>;
  // @ts-expect-error: no such level
  await session.transaction({ isolationLevel: 'chaos' });
  const configured = await session.transaction({ readOnly: true });
  type _configured = Expect<Equal<typeof configured, Session>>;
  await Promise.all([configured.commit(), strict.rollback()]);
  return session.savepoint(async (savepoint) => savepoint.outcome);
}
