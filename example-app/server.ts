import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import createKnex from 'knex';
import { createApp } from './app';
import { closeServer } from './close-server';
import { assertReachable, configFor } from './database';
import { migrate } from './migrations';
import { seedIfEmpty } from './seed';
import { databaseUrlFrom, portFrom, StartError } from './settings';
import { welcome } from './welcome';

/** What undoes each step of start(), in the order of the steps. */
const undo: (() => Promise<unknown>)[] = [];

async function start(): Promise<void> {
  const port = portFrom(process.env['PORT']);
  const url = databaseUrlFrom(process.env['DATABASE_URL']) ?? (await startOwnPostgres());
  await assertReachable(url);

  const knex = createKnex(configFor(url));
  undo.push(() => Promise.race([knex.destroy(), delay(2_000)])); // It waits for connections in use, however long.
  await migrate(knex);
  await seedIfEmpty(knex);

  const server = createServer(createApp(knex)).listen(port);
  await once(server, 'listening').catch((error: NodeJS.ErrnoException) => {
    throw new StartError(`Cannot listen on port ${port} (${error.code}). Choose another, for example: PORT=${port + 1} npm start`);
  });
  undo.push(() => closeServer(server, 5_000));

  console.log(welcome((server.address() as AddressInfo).port));
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

/**
 * Last step first: requests in flight still need the pool, and the pool the database. Each step has a limit, and together
 * they end before Docker, which waits for 10 s, loses its patience.
 */
async function stop(exitCode: number): Promise<void> {
  for (const step of undo.splice(0).reverse()) {
    await step().catch((error: unknown) => {
      console.error(error);
      exitCode = 1;
    });
  }
  process.exit(exitCode);
}

const started = start().catch((error: unknown) => {
  console.error(error instanceof StartError ? error.message : error);
  return stop(1);
});

let signalledAt: number | undefined;

function onSignal(): void {
  // One Ctrl-C arrives twice: from the terminal, which tells every process, and from npm, which passes it on.
  if (signalledAt && Date.now() - signalledAt < 500) return;
  if (signalledAt) process.exit(130);
  signalledAt = Date.now();
  console.log('Finishing the requests in flight. Press Ctrl-C again to stop at once.');
  void started.then(() => stop(0));
}

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, onSignal);

if (process.env['npm_lifecycle_event']) {
  // Between npm and us is a shell, which dies of a SIGTERM without passing it on.
  const shell = process.ppid;
  const watch = setInterval(() => {
    if (process.ppid === shell) return;
    clearInterval(watch);
    onSignal();
  }, 200).unref();
}
