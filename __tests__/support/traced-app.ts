import express from 'express';
import { sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import { traceSessions } from 'express-knex-session/opentelemetry';
import createKnex, { type Knex } from 'knex';
import { listen, post } from './http';

export interface Stage {
  connection: Knex.PgConnectionConfig;
  /** What is asked for: one after the other; those of an array at once. */
  paths: (string | string[])[];
}

export async function serve({ connection, paths }: Stage): Promise<number[]> {
  const stopTracing = traceSessions();
  const knex = createKnex({ client: 'pg', connection, pool: { min: 0, max: 3 } });
  const http = await listen(appOn(knex));
  const answers: number[] = [];
  for (const group of paths) {
    const received = await Promise.all([group].flat().map((path) => post(`${http.url}${path}`)));
    answers.push(...received.map(({ status }) => status));
  }
  await http.close();
  await knex.destroy();
  stopTracing();
  return answers;
}

/** `POST /<count>/<name>/<status>` stores that many notes with this name. */
function appOn(knex: Knex): express.Express {
  const app = express();
  app.use(sessionMiddleware(knex));
  app.post('/:count/:name/:status', async (req, res) => {
    const { count, name, status } = req.params;
    for (let i = 0; i < Number(count); i++) await req.session('notes').insert({ id: `${name} ${i}` });
    res.sendStatus(Number(status));
  });
  app.post('/twice/:name', async (req, res) => {
    const add = () => req.session('notes').insert({ id: req.params.name });
    await add();
    await add().catch(() => {});
    res.sendStatus(201);
  });
  app.use(sessionErrorHandler());
  app.use(((_error, _req, res, _next) => void res.sendStatus(500)) satisfies express.ErrorRequestHandler);
  return app;
}
