/* The app under test, in a process of its own. */
import { once } from 'node:events';
import type { AddressInfo, Socket } from 'node:net';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import express, { type ErrorRequestHandler } from 'express';
import createKnex from 'knex';
import type { SessionStats } from '../lib';
import { answerQuestions, settingsOf } from './child';
import { type Deadlines, type KindName, stormSettings } from './kinds';
import { type Holds, type Mishaps, watchPool, watchProcess } from './monitor';
import { resourcesOf } from './resources';
import { handlers, rowsQuery } from './routes';
import { applicationName } from './schema';

export interface ServerSettings {
  databaseUrl: string;
  libFolder: string;
  deadlines: Deadlines;
}

/** What the app's process tells of itself. */
export interface ServerFigures extends Mishaps, Holds {
  used: number;
  waiting: number;
  stats: SessionStats;
  /** What `onError` was given, by code. */
  reported: Record<string, number>;
}

const mishaps = watchProcess();
const { databaseUrl, libFolder, deadlines } = settingsOf<ServerSettings>();

async function main(): Promise<void> {
  // The package as it is in that folder: mutants have one of their own.
  const { sessionMiddleware, sessionErrorHandler }: typeof import('../lib') = await import(join(libFolder, 'index.ts'));
  const knex = createKnex({
    client: 'pg',
    connection: { connectionString: databaseUrl, application_name: applicationName },
    pool: { min: 0, max: stormSettings.poolSize },
    // It complains about each lost connection.
    log: { warn() {}, error() {} },
  });
  const holds = watchPool(knex, (sql) => sql.startsWith(rowsQuery));
  const reported: Record<string, number> = {};

  const sessions = sessionMiddleware(knex, {
    ...deadlines,
    commitAt: (req) => (req.path.startsWith('/export') ? 'end' : 'head'),
    onError(error) {
      const code = (error as { code?: string }).code ?? String(error);
      reported[code] = (reported[code] ?? 0) + 1;
    },
  });
  const app = express();
  // Express prints errors otherwise.
  app.set('env', 'test');
  app.use(express.json());
  app.use(sessions);
  app.all('/:kind/:id', (req, res, next) => {
    res.locals['id'] = req.params.id;
    return handlers[req.params.kind as KindName](req, res, next);
  });
  app.use(sessionErrorHandler());
  app.use(answerError);

  const server = app.listen(0, '127.0.0.1');
  // A client that sends its next request while we close the connection gets no answer, and none is to blame.
  server.keepAliveTimeout = 600_000;
  const sockets = new Set<Socket>();
  server.on('connection', (socket) => {
    sockets.add(socket);
    socket.once('close', () => sockets.delete(socket));
  });
  await once(server, 'listening');

  answerQuestions({
    port: () => (server.address() as AddressInfo).port,
    figures(): ServerFigures {
      const { pool } = knex.client;
      return { ...mishaps, ...holds(), used: pool.numUsed(), waiting: pool.numPendingAcquires(), stats: sessions.stats(), reported };
    },
    resources: () => resourcesOf(server, sockets, knex),
    drain: async (ms: number) => {
      const start = performance.now();
      await Promise.race([sessions.drain(ms), sleep(stormSettings.neverMs)]);
      return { ms: performance.now() - start, open: sessions.stats().open };
    },
  });
}

const answerError: ErrorRequestHandler = (error, _req, res, next) => {
  if (res.headersSent) return next(error);
  res.status(error.status ?? 500).json({ id: res.locals['id'], code: error.code ?? 'APP' });
};

main();
