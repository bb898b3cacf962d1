import { once } from 'node:events';
import type { AddressInfo } from 'node:net';
import express from 'express';
import { sessionMiddleware } from 'express-knex-session';
import createKnex from 'knex';

interface Note {
  text: string;
}

async function main(): Promise<void> {
  const knex = createKnex({ client: 'pg', connection: process.env['DATABASE_URL'] ?? '' });
  const app = express();
  app.use(sessionMiddleware(knex));
  app.post('/notes', async (req, res) => {
    // Typed with no other import: as a Knex.Transaction, and more.
    const notes: Pick<Note, 'text'>[] = await req.session<Note>('notes').insert({ text: 'from TypeScript' }, ['text']);
    req.session.setRollbackOnly satisfies (reason?: never) => void;
    // @ts-expect-error: not any
    req.session.noSuchThing;
    res.status(201).json(notes[0]);
  });

  const server = app.listen(0);
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  const response = await fetch(`http://127.0.0.1:${port}/notes`, { method: 'POST' });
  console.log(JSON.stringify({ status: response.status, body: await response.json() }));
  server.close();
  await knex.destroy();
}

void main();
