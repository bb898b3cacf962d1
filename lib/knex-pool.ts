import type { EventEmitter } from 'node:events';
import type { Knex } from 'knex';
import type { PgConnection } from './postgres';

/** What the pool of a Knex client (tarn) has to itself, as far as it is used here. */
interface Tarn {
  readonly destroyed: boolean;
  readonly free: { readonly resource: PgConnection }[];
  readonly used: unknown[];
  readonly pendingAcquires: readonly unknown[];
  readonly emitter: EventEmitter;
  readonly interval: unknown;
}

/**
 * Takes a connection that is free now, as tarn would. Its own way to one makes a dozen promises and two timers, a tenth of what a small
 * request allocates.
 *
 * @returns undefined if there is none, if somebody waits for one, if somebody listens, or if anything is not as it is by default in what
 *   Knex asks of a connection before it hands it out: then the client must be asked
 */
export function takeFreeConnection(client: Knex.Client): PgConnection | undefined {
  const pool = client.pool as unknown as Tarn | undefined;
  if (pool === undefined || !isPlain(client, pool) || pool.destroyed || pool.pendingAcquires.length > 0) return undefined;
  const free = pool.free.at(-1);
  if (free === undefined || free.resource.__knex__disposed || isHeard(pool.emitter)) return undefined;
  // Nothing looks for idle connections yet: its timer must not begin in the context of this request.
  if (!pool.interval) return undefined;
  pool.free.pop();
  pool.used.push(free);
  return free.resource;
}

function isHeard(emitter: EventEmitter): boolean {
  return emitter.listenerCount('acquireRequest') > 0 || emitter.listenerCount('acquireSuccess') > 0;
}

const arePlain = new WeakMap<Tarn, boolean>();
/** `knex.initialize()` makes another one, of options that the client does not show. */
const firstPools = new WeakMap<Knex.Client, Tarn>();

function isPlain(client: Knex.Client, pool: Tarn): boolean {
  let isPlain = arePlain.get(pool);
  if (isPlain === undefined) {
    if (!firstPools.has(client)) firstPools.set(client, pool);
    isPlain = firstPools.get(client) === pool && isTarn(pool) && hasKnownOptions(client.config) && isKnexOwn(client);
    arePlain.set(pool, isPlain);
  }
  // Somebody may put methods of his own in between at any time.
  return isPlain && !Object.hasOwn(pool, 'acquire') && !Object.hasOwn(client, 'acquireConnection');
}

function isTarn(pool: Tarn): boolean {
  const { free, used, pendingAcquires, emitter } = pool;
  const hasLists = [free, used, pendingAcquires].every(Array.isArray);
  return hasLists && typeof emitter?.listenerCount === 'function' && 'interval' in pool;
}

/** Whether Knex has nothing to ask of a connection but that it lives: no `validate`, no lifetime, no settings that expire. */
function hasKnownOptions({ connection, connectionPool, pool }: Knex.Config & { connectionPool?: unknown }): boolean {
  return connectionPool === undefined && typeof connection !== 'function' && Object.keys(pool ?? {}).every((name) => HARMLESS.has(name));
}

/** Whether no class that was made of Knex's has its own way. */
function isKnexOwn(client: Knex.Client): boolean {
  const prototypes: object[] = [];
  for (let prototype: object | null = Object.getPrototypeOf(client); prototype; prototype = Object.getPrototypeOf(prototype))
    prototypes.push(prototype);
  return ['acquireConnection', 'validateConnection'].every((name) => prototypes.filter((one) => Object.hasOwn(one, name)).length === 1);
}

const HARMLESS = new Set([
  'name',
  'min',
  'max',
  'acquireTimeoutMillis',
  'createTimeoutMillis',
  'destroyTimeoutMillis',
  'idleTimeoutMillis',
  'reapIntervalMillis',
  'createRetryIntervalMillis',
  'propagateCreateError',
  'afterCreate',
  'log',
]);
