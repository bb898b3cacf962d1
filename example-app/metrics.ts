import type { RequestHandler } from 'express';
import { type SessionChannel, type SessionMessage, type SessionMiddleware, sessionChannels } from 'express-knex-session';
import type { Knex } from 'knex';
import { Counter, Gauge, Histogram, Registry } from 'prom-client';

export interface SessionMetrics {
  /** Answers Prometheus. It takes no connection, so it works without a database, and while none is free. */
  handler: RequestHandler;
  /** Unsubscribes, for tests: else it listens as long as the process lives. */
  stop(): void;
}

/** What Prometheus is told about the sessions on one pool. @param sessions what `sessionMiddleware(knex)` has returned */
export function sessionMetrics(knex: Knex, sessions: SessionMiddleware, register = new Registry()): SessionMetrics {
  const registers = [register];
  const gauge = (name: string, help: string, read: () => number) =>
    new Gauge({
      name,
      help,
      registers,
      collect() {
        this.set(read());
      },
    });
  gauge('db_sessions_open', 'Sessions that hold a connection', () => sessions.stats().open);
  gauge('db_sessions_waiting', 'Sessions that wait for a connection', () => sessions.stats().waiting);
  gauge('db_pool_connections_used', 'Connections that are in use, by sessions or others', () => knex.client.pool.numUsed());
  gauge('db_pool_connections_max', 'Connections that the pool may have', () => knex.client.pool.max);

  // From 1 ms to 30 s, where `transactionTimeout` ends a transaction unless it is told otherwise.
  const buckets = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30];
  const histogram = (name: string, help: string) => new Histogram({ name, help, registers, buckets, labelNames: ['outcome'] });
  const waited = histogram('db_session_waited_seconds', 'How long transactions have waited for a connection');
  const held = histogram('db_session_held_seconds', 'How long transactions have held their connection');

  const settled = new Counter({
    name: 'db_sessions_settled_total',
    help: 'Ended transactions',
    registers,
    labelNames: ['outcome', 'reason'],
  });
  // Prometheus sees no increase in a series that begins with 1, and the first of these is worth an alert.
  settled.inc({ outcome: 'unknown', reason: 'error' }, 0);
  const destroyed = new Counter({ name: 'db_connections_destroyed_total', help: 'Connections not given back', registers });
  const lateUses = new Counter({ name: 'db_session_late_uses_total', help: 'Uses of a session after its end', registers });

  // The channels tell of every session in the process; those on this pool, also in withSession(), have it by inheritance.
  const unsubscribe: (() => void)[] = [];
  function count<Message extends SessionMessage>(channel: SessionChannel<Message>, add: (message: Message) => void): void {
    const listener = (message: Message): void => {
      if (message.session.client.pool === knex.client.pool) add(message);
    };
    channel.subscribe(listener);
    unsubscribe.push(() => channel.unsubscribe(listener));
  }
  count(sessionChannels.settled, ({ waitedMs = 0, heldMs, ...message }) => {
    const outcome = String(message.outcome);
    settled.inc({ outcome, reason: String(message.reason) });
    waited.observe({ outcome }, waitedMs / 1_000);
    if (heldMs !== undefined) held.observe({ outcome }, heldMs / 1_000);
  });
  count(sessionChannels.destroyed, () => destroyed.inc());
  count(sessionChannels.late, () => lateUses.inc());

  return {
    async handler(_req, res) {
      res.set('Content-Type', register.contentType).end(await register.metrics());
    },
    stop: () => {
      for (const stop of unsubscribe) stop();
    },
  };
}
