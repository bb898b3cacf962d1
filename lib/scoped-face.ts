import type { Knex } from 'knex';
import { SessionError } from './errors';
import { type KnexFace, refuseDestroy } from './knex-face';
import type { Scope } from './scope';
import { isLease } from './statement-queue';

type Method = (...args: any[]) => any;

export interface Meant {
  /** The level that a statement belongs to; none if it belongs to the pool. */
  current(): Scope | undefined;
  isInRequest(): boolean;
}

/** A Knex that has no session of its own: leases are those of the session that is meant, connections those of the pool. */
export function scopedFace(knex: Knex, face: KnexFace, meant: Meant): Knex {
  const scoped = face.faceOver(clientProperties(knex, meant));
  const methods = knex as unknown as Record<string, Method>;
  // Its listeners are those of the Knex instance, which hears every statement.
  for (const name of EMITTER) scoped[name] = (...args: unknown[]) => methods[name]?.(...args);
  // For administration, outside of requests.
  for (const name of ['migrate', 'seed']) {
    Object.defineProperty(scoped, name, {
      configurable: true,
      get: () => {
        if (meant.isInRequest())
          throw new SessionError('ERR_SESSION_DESTROY', `knex.${name} is not for a session. Use the Knex instance itself.`);
        return methods[name];
      },
    });
  }
  return scoped as unknown as Knex;
}

function clientProperties(knex: Knex, { current, isInRequest }: Meant): PropertyDescriptorMap {
  const client = knex.client as Record<string, Method>;
  // As the session's own: its listeners hear of it.
  const ownOrPools =
    (name: string): Method =>
    (connection, ...args) => {
      const owner = isLease(connection) ? ((connection.level as Scope).client as unknown as Record<string, Method>) : client;
      return owner[name]?.(connection, ...args);
    };
  const onlyOutside =
    (name: string): Method =>
    (...args) => {
      if (isInRequest()) refuseDestroy();
      return client[name]?.(...args);
    };
  return Object.getOwnPropertyDescriptors({
    _events: undefined,
    _eventsCount: 0,
    // As Knex reports it, if it is not meant for anybody now.
    acquireConnection: async () => current()?.lease() ?? knex.client.acquireConnection(),
    releaseConnection: ownOrPools('releaseConnection'),
    query: ownOrPools('query'),
    stream: ownOrPools('stream'),
    cancelQuery: ownOrPools('cancelQuery'),
    transaction: (...args: unknown[]) =>
      ((current()?.client as unknown as Record<string, Method> | undefined) ?? client)['transaction']?.(...args),
    emit: (event: string, ...values: unknown[]) => knex.client.emit(event, ...values),
    destroy: onlyOutside('destroy'),
    initializePool: onlyOutside('initializePool'),
  });
}

const EMITTER = [
  'on',
  'once',
  'off',
  'addListener',
  'removeListener',
  'prependListener',
  'prependOnceListener',
  'removeAllListeners',
  'listeners',
  'listenerCount',
  'emit',
];
