import type { PgConnection } from './postgres';

/** Who is told of the loss of a connection, while a session holds it. */
export interface LossWatch {
  onLost: ((error?: unknown) => void) | undefined;
}

const watches = new WeakMap<PgConnection, LossWatch>();

/**
 * The watch of a connection, for all the sessions that will have it: to put listeners on and off for each cost 4 % of a small request.
 *
 * pg.Pool has no listener on a client that is checked out, and a killed backend would be an uncaught exception. While no session holds
 * the connection, it still is one.
 */
export function watchLoss(pg: PgConnection): LossWatch {
  let watch = watches.get(pg);
  if (watch === undefined) {
    const created: LossWatch = { onLost: undefined };
    pg.on('error', (error) => {
      if (created.onLost) created.onLost(error);
      else if (pg.listenerCount('error') === 1) throw error;
    });
    pg.on('end', () => created.onLost?.());
    watches.set(pg, created);
    watch = created;
  }
  return watch;
}
