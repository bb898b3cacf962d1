import type { PgConnection } from './postgres';

/** Who is told of the loss of a connection, while a session holds it. */
export interface LossWatch {
  onLost: ((error?: unknown) => void) | undefined;
}

/** On a connection, for all copies of this package. */
const WATCH = Symbol.for('express-knex-session.loss');

/**
 * The watch of a connection, for all the sessions that will have it: to put listeners on and off for each cost 4 % of a small request.
 *
 * pg.Pool has no listener on a client that is checked out: a killed backend would be an uncaught exception. While no session holds the
 * connection and nobody else listens, the error ends the process as it would without us.
 */
export function watchLoss(pg: PgConnection): LossWatch {
  const watched = pg as PgConnection & { [WATCH]?: LossWatch };
  if (watched[WATCH] === undefined) {
    const watch: LossWatch = { onLost: undefined };
    pg.on('error', (error) => {
      if (watch.onLost) watch.onLost(error);
      else if (pg.listenerCount('error') === 1) throw error;
    });
    pg.on('end', () => watch.onLost?.());
    watched[WATCH] = watch;
  }
  return watched[WATCH];
}
