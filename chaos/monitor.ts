import type { Knex } from 'knex';

/** What the app's process saw that must not be. */
export interface Mishaps {
  unhandledRejections: number;
  uncaughtExceptions: number;
  warnings: number;
  /** The first few, in words. */
  details: string[];
}

export function watchProcess(): Mishaps {
  const mishaps: Mishaps = { unhandledRejections: 0, uncaughtExceptions: 0, warnings: 0, details: [] };
  const note = (what: keyof Omit<Mishaps, 'details'>, problem: unknown) => {
    mishaps[what]++;
    if (mishaps.details.length < 5) mishaps.details.push(`${what}: ${(problem as Error | undefined)?.stack ?? String(problem)}`);
  };
  process.on('unhandledRejection', (reason) => note('unhandledRejections', reason));
  process.on('uncaughtException', (error) => note('uncaughtExceptions', error));
  process.on('warning', (warning) => note('warnings', warning));
  return mishaps;
}

export interface Holds {
  longestMs: number;
  /** Connections with a row stream are counted apart: one that moves has no bound. */
  longestWithStreamMs: number;
  /** Connections that were given back although nobody had them. */
  returnedTwice: number;
}

/** Measures how long connections are held, from the pool's own events. */
export function watchPool(knex: Knex, isStream: (sql: string) => boolean): () => Holds {
  const { pool } = knex.client;
  const held = new Map<{ __knexUid?: string }, { since: number; hasStream: boolean }>();
  const holds: Holds = { longestMs: 0, longestWithStreamMs: 0, returnedTwice: 0 };
  const note = ({ since, hasStream }: { since: number; hasStream: boolean }) => {
    const name = hasStream ? 'longestWithStreamMs' : 'longestMs';
    holds[name] = Math.max(holds[name], performance.now() - since);
  };
  pool.on('acquireSuccess', (_id: number, connection: object) => held.set(connection, { since: performance.now(), hasStream: false }));
  pool.on('release', (connection: object) => {
    const hold = held.get(connection);
    if (hold) note(hold);
    else holds.returnedTwice++;
    held.delete(connection);
  });
  knex.on('query', ({ sql, __knexUid }: { sql: string; __knexUid?: string }) => {
    if (!isStream(sql)) return;
    for (const [connection, hold] of held) hold.hasStream ||= connection.__knexUid === __knexUid;
  });
  return () => {
    for (const hold of held.values()) note(hold);
    return holds;
  };
}
