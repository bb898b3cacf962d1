// Compiled by itself: what it registers holds for a whole program.
import express from 'express';
import { getSession, type PropertyName, type Session, sessionMiddleware } from 'express-knex-session';
import expressSession from 'express-session';
import createKnex from 'knex';
import type { Equal, Expect } from './equal.js';

declare module 'express-knex-session' {
  interface Register {
    property: 'db';
  }
}
declare module 'express-session' {
  interface SessionData {
    userId: number;
  }
}

type _property = Expect<Equal<PropertyName, 'db'>>;

const app = express();
app.use(expressSession({ secret: 'x', resave: false, saveUninitialized: false }));
app.use(sessionMiddleware(createKnex({ client: 'pg' }), { property: 'db' }));
app.get('/', async (req, res) => {
  type _db = Expect<Equal<typeof req.db, Session>>;
  type _userId = Expect<Equal<typeof req.session.userId, number | undefined>>;
  req.session.regenerate(() => {});
  // @ts-expect-error: the login session runs no queries
  req.session('users');
  // @ts-expect-error: the database session logs nobody in
  req.db.regenerate();
  res.json(await getSession(req, 'db')('users'));
});
