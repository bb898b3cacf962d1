import { once } from 'node:events';
import { createRequire } from 'node:module';
import express from 'express';
import * as namespace from 'express-knex-session';
import { getSession, SessionError, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import createKnex from 'knex';

// One copy of the package, however it is loaded: two would not know each other's sessions and errors.
const required = createRequire(import.meta.url)('express-knex-session');
for (const name of Object.keys(required)) {
  // biome-ignore lint/performance/noDynamicNamespaceImportAccess: to look at every export
  if (namespace[name] !== required[name]) throw new Error(`${name} differs between import and require`);
}

const knex = createKnex({ client: 'pg', connection: process.env['DATABASE_URL'] });
await withSession(knex, (session) => session('notes').insert({ text: 'before' }));
if (!(new SessionError('ERR_SESSION_CLOSED', 'x') instanceof Error)) throw new Error('SessionError is no Error');

const app = express();
app.use(sessionMiddleware(knex));
app.post('/notes', async (req, res) => {
  const [note] = await getSession(req)('notes').insert({ text: 'from ESM' }, 'text');
  res.status(201).json(note);
});
app.use(sessionErrorHandler());

const server = app.listen(0);
await once(server, 'listening');
const response = await fetch(`http://127.0.0.1:${server.address().port}/notes`, { method: 'POST' });
console.log(JSON.stringify({ status: response.status, body: await response.json() }));
server.close();
await knex.destroy();
