// Middleware of ours in front of handlers leaves them the types of their own requests and responses.
import express, { type RequestHandler, type Response, Router } from 'express';
import {
  type RouteErrorMiddleware,
  type RouteMiddleware,
  type Session,
  type SessionMiddleware,
  sessionErrorHandler,
  sessionMiddleware,
  sessionOptions,
} from 'express-knex-session';
import createKnex from 'knex';
import type { Equal, Expect } from './equal.js';

interface Params {
  id: string;
}
interface Answer {
  id: string;
}
interface Body {
  amount: number;
}

const knex = createKnex({ client: 'pg' });
const sessions: SessionMiddleware = sessionMiddleware(knex);
export const readOnly: RouteMiddleware = sessionOptions({ readOnly: true });
export const rollsBack: RouteErrorMiddleware = sessionErrorHandler();
// As any handler, where there are no types to lose.
export const handlers: RequestHandler[] = [sessions, readOnly];

const app = express();
// Parameters out of the path.
app.get('/accounts/:id', readOnly, (req, res) => {
  const id: string = req.params.id;
  // @ts-expect-error: no such parameter
  req.params.name;
  type _session = Expect<Equal<typeof req.session, Session>>;
  res.json(id);
});
app.get('/accounts/:id', sessions, readOnly, (req) => void req.params.id.trim(), rollsBack);
app.use('/accounts/:id', sessions, (req) => void req.params.id.trim());
Router()
  .use(sessions)
  .get('/:id', readOnly, (req) => void req.params.id.trim());
app
  .route('/accounts/:id')
  .all(readOnly)
  .get((req) => void req.params.id.trim());

// Types that the handler declares, or is given.
const deposit: RequestHandler<Params, Answer, Body> = (req, res) => void res.json({ id: req.params.id });
app.post('/accounts/:id', readOnly, deposit, rollsBack);
app.post('/accounts/:id', [readOnly], deposit);
app.put('/accounts/:id', readOnly, (req: express.Request<Params, Answer, Body>, res: Response<Answer>) => {
  res.json({ id: req.params.id });
});
app.put<Params, Answer, Body>('/accounts/:id', sessions, readOnly, (req, res) => {
  type _params = Expect<Equal<typeof req.params, Params>>;
  type _amount = Expect<Equal<typeof req.body.amount, number>>;
  // @ts-expect-error: another answer
  res.json({ name: 'x' });
});
