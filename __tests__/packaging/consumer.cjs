const { once } = require('node:events');
const express = require('express');
const createKnex = require('knex');
const { sessionErrorHandler, sessionMiddleware } = require('express-knex-session');

async function main() {
  const knex = createKnex({ client: 'pg', connection: process.env['DATABASE_URL'] });
  const app = express();
  app.use(sessionMiddleware(knex));
  app.post('/notes', async (req, res) => {
    const [note] = await req.session('notes').insert({ text: 'from CommonJS' }, 'text');
    res.status(201).json(note);
  });
  app.use(sessionErrorHandler());

  const server = app.listen(0);
  await once(server, 'listening');
  const response = await fetch(`http://127.0.0.1:${server.address().port}/notes`, { method: 'POST' });
  console.log(JSON.stringify({ status: response.status, body: await response.json() }));
  server.close();
  await knex.destroy();
}

main();
