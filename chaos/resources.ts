import type { EventEmitter } from 'node:events';
import type { Server } from 'node:http';
import type { Socket } from 'node:net';
import type { Knex } from 'knex';

/** What a process that is at rest keeps. */
export interface Resources {
  heapBytes: number;
  sockets: number;
  /** Of the one that has most. */
  listenersOnSocket: number;
  listenersOnConnection: number;
  listenersOnServer: number;
  listenersOnPool: number;
  listenersOnProcess: number;
  timers: number;
}

/** Needs `--expose-gc`. */
export async function resourcesOf(server: Server, sockets: ReadonlySet<Socket>, knex: Knex): Promise<Resources> {
  for (let round = 0; round < 3; round++) {
    globalThis.gc?.();
    // Finalizers, and what they let go.
    await new Promise((resolve) => setImmediate(resolve));
  }
  const { pool } = knex.client;
  const connections: (EventEmitter & { connection: EventEmitter & { stream: EventEmitter } })[] = pool.free.map(
    ({ resource }: { resource: EventEmitter }) => resource,
  );
  return {
    heapBytes: process.memoryUsage().heapUsed,
    sockets: sockets.size,
    listenersOnSocket: most([...sockets].map(listenersOf)),
    listenersOnConnection: most(
      connections.map((client) => listenersOf(client) + listenersOf(client.connection) + listenersOf(client.connection.stream)),
    ),
    listenersOnServer: listenersOf(server),
    listenersOnPool: listenersOf(knex as unknown as EventEmitter) + listenersOf(knex.client) + listenersOf(pool.emitter),
    listenersOnProcess: listenersOf(process),
    timers: process.getActiveResourcesInfo().filter((name) => name === 'Timeout' || name === 'Immediate').length,
  };
}

function listenersOf(emitter: EventEmitter): number {
  return emitter.eventNames().reduce((sum, event) => sum + emitter.listenerCount(event), 0);
}

function most(counts: number[]): number {
  return Math.max(0, ...counts);
}
