import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { constants } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { SessionUnavailableError } from 'express-knex-session';
import createKnex from 'knex';
import { createApp } from './app';
import { closeServer } from './close-server';
import { assertReachable, configFor } from './database';
import type { Transfer } from './journal';
import { sessionMetrics } from './metrics';
import { migrate } from './migrations';
import { seedIfEmpty } from './seed';
import { databaseUrlFrom, portFrom, StartError } from './settings';
import { welcome } from './welcome';

/**
 * Docker kills what has not ended 10 s after SIGTERM. At most: 3 s for the requests in flight, then 3 s for a COMMIT that hangs
 * (`settleTimeout`), 1 s for slow readers, 0.5 s for the pool; the rest is for our own PostgreSQL.
 */
const STOP_WITHIN_MS = 9_000;

/** What undoes each step of start(), in the order of the steps. */
const undo: (() => Promise<unknown>)[] = [];

async function start(): Promise<void> {
  const port = portFrom(process.env['PORT']);
  const url = databaseUrlFrom(process.env['DATABASE_URL']) ?? (await startOwnPostgres());
  await assertReachable(url);

  const knex = createKnex(configFor(url));
  // No session is left by then. It says goodbye on each free connection, which a database that does not answer would not end.
  undo.push(() => Promise.race([knex.destroy(), delay(500)]));
  await migrate(knex);
  await seedIfEmpty(knex);

  const { app, sessions, endStreams } = createApp(knex, {
    logError,
    notify,
    metrics: (sessions) => sessionMetrics(knex, sessions).handler,
  });
  const server = createServer(app).listen(port);
  await once(server, 'listening').catch((error: NodeJS.ErrnoException) => {
    throw new StartError(`Cannot listen on port ${port} (${error.code}). Choose another, for example: PORT=${port + 1} npm start`);
  });
  undo.push(() => {
    const closed = closeServer(server, sessions);
    endStreams(); // Now, when nobody can connect again.
    return closed;
  });

  if (!signalledAt) console.log(welcome((server.address() as AddressInfo).port));
}

async function startOwnPostgres(): Promise<string> {
  const { startPostgres } = await import('../tools/postgres.mjs');
  const dataDir = process.env['DATA_DIR'] || join(__dirname, '../.data');
  const postgres = await startPostgres({ dataDir }).catch((error: Error) => {
    throw new StartError(error.message);
  });
  undo.push(() => postgres.stop());
  if (postgres.notice) console.log(postgres.notice);
  return postgres.url;
}

function notify({ id, amount }: Transfer): void {
  console.log(`Transfer ${id}: ${amount} cents.`);
}

function logError(error: unknown): void {
  // While it stops, requests are refused and given up on purpose.
  if (signalledAt && error instanceof SessionUnavailableError) givenUp++;
  else console.error(error);
}

/** Last step first: requests in flight need the pool, and the pool needs the database. */
async function stop(exitCode: number): Promise<void> {
  for (const step of undo.splice(0).reverse()) {
    await step().catch((error: unknown) => {
      console.error(error);
      exitCode = 1;
    });
  }
  if (givenUp > 0) console.log(`Refused or gave up ${givenUp} requests. Nothing of them is stored.`);
  process.exit(exitCode);
}

let signalledAt: number | undefined;
let givenUp = 0;

const started = start().catch((error: unknown) => {
  console.error(error instanceof StartError ? error.message : error);
  return stop(1);
});

function onSignal(signal: NodeJS.Signals): void {
  // One Ctrl-C arrives twice: from the terminal, which tells every process, and from npm, which passes it on.
  if (signalledAt && Date.now() - signalledAt < 500) return;
  if (signalledAt) process.exit(128 + constants.signals[signal]);
  signalledAt = Date.now();
  console.log('Finishing the requests in flight. Press Ctrl-C again to stop at once.');
  void started.then(() => stop(0));
  // Every step above has its own limit. This is for those that have none: a start that hangs, PostgreSQL on a slow disk.
  setTimeout(() => {
    console.error(`Not stopped after ${STOP_WITHIN_MS} ms. Leaving all the same.`);
    process.exit(1);
  }, STOP_WITHIN_MS).unref();
}

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, onSignal);

if (process.env['npm_lifecycle_event']) {
  // Between npm and us is a shell, which dies of a SIGTERM without passing it on.
  const shell = process.ppid;
  const watch = setInterval(() => {
    if (process.ppid === shell) return;
    clearInterval(watch);
    onSignal('SIGTERM');
  }, 200).unref();
}
