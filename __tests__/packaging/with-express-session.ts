import express from 'express';
import { type Session, sessionMiddleware } from 'express-knex-session';
import expressSession from 'express-session';
import createKnex from 'knex';

declare module 'express-knex-session' {
  interface Register {
    property: 'db';
  }
}

const app = express();
app.use(expressSession({ secret: 'x', resave: false, saveUninitialized: false }));
app.use(sessionMiddleware(createKnex({ client: 'pg' }), { property: 'db' }));
app.get('/', async (req, res) => {
  const session: Session = req.db;
  // express-session's own type, untouched.
  const id: string = req.session.id;
  req.session.save();
  // @ts-expect-error: req.db has nothing of it
  req.db.save();
  res.json({ id, rows: await session('notes') });
});
