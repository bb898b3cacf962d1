// Compiled by itself: what it registers holds for a whole program.
import express from 'express';
import { type Session, sessionMiddleware } from 'express-knex-session';
import createKnex from 'knex';
import type { Equal, Expect } from './equal.js';

declare module 'express-knex-session' {
  interface Register {
    property: 'orders' | 'reports';
  }
}

const app = express();
app.use(sessionMiddleware(createKnex({ client: 'pg' }), { property: 'orders' }));
app.use(sessionMiddleware(createKnex({ client: 'pg' }), { property: 'reports' }));
app.get('/', (req) => {
  type _orders = Expect<Equal<typeof req.orders, Session>>;
  type _reports = Expect<Equal<typeof req.reports, Session>>;
  // @ts-expect-error: not under its default name
  req.session;
});
