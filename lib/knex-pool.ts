import type { EventEmitter } from 'node:events';
import type { Knex } from 'knex';
import type { PgConnection } from './postgres';

/** The pool of a Knex client (tarn), as far as its inside is used here. */
interface Tarn {
  readonly destroyed: boolean;
  readonly max: number;
  readonly acquireTimeoutMillis: number;
  readonly free: Resource[];
  readonly used: Resource[];
  readonly pendingCreates: readonly unknown[];
  readonly pendingAcquires: unknown[];
  readonly emitter: EventEmitter;
  readonly interval: unknown;
}

interface Resource {
  readonly resource: PgConnection;
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

/**
 * Waits for a connection of a pool that is full, in tarn's own queue, and without its timer, its dozen promises, and their 3 kB for as long
 * as it takes. Whoever waits must give up by himself.
 *
 * @param patience for how many ms
 * @returns undefined if the client must be asked, see {@link takeFreeConnection}
 */
export function queueForConnection(client: Knex.Client, patience: number): PlaceInQueue | undefined {
  const pool = client.pool as unknown as Tarn | undefined;
  if (pool === undefined || !isPlain(client, pool) || pool.destroyed || isHeard(pool.emitter)) return undefined;
  // Knex has a limit of its own, and an error that says so.
  if (patience > pool.acquireTimeoutMillis) return undefined;
  // Another connection is made if somebody asks for it.
  if (pool.free.length > 0 || pool.used.length + pool.pendingCreates.length < pool.max) return undefined;
  return new PlaceInQueue(pool.pendingAcquires);
}

/** What tarn sees of one that waits (its `PendingOperation`). */
export class PlaceInQueue {
  /** Rejects if no connection can be made, or when the pool is destroyed. */
  readonly promise: Promise<PgConnection>;
  isRejected = false;
  /** Why no connection could be made: tarn's note. */
  possibleTimeoutCause: unknown = null;
  resolve!: (connection: PgConnection) => void;
  private fail!: (error: unknown) => void;

  constructor(private readonly queue: unknown[]) {
    this.promise = new Promise((resolve, reject) => {
      this.resolve = resolve;
      this.fail = reject;
    });
    queue.push(this);
  }

  reject(error: unknown): void {
    this.leave();
    this.abort(error);
  }

  /** By the destruction of the pool, which goes through its queue: nobody must leave that now. */
  abort(error: unknown = new Error('aborted')): void {
    this.isRejected = true;
    this.fail(error);
  }

  /** One that tarn is looking for a connection for gets it all the same. */
  leave(): void {
    const index = this.queue.indexOf(this);
    if (index >= 0) this.queue.splice(index, 1);
  }
}

/**
 * Gives a connection to whoever has waited longest, if that is one of ours: tarn would look at it once more, by another dozen promises and
 * two timers.
 *
 * @returns whether it was given: if not, it goes back to the pool
 */
export function handOver(connection: PgConnection, pool: object): boolean {
  const { pendingAcquires, used, destroyed, emitter } = pool as Partial<Tarn>;
  const next = pendingAcquires?.[0];
  if (!(next instanceof PlaceInQueue) || destroyed || connection.__knex__disposed) return false;
  if (isHeard(emitter as EventEmitter) || Object.hasOwn(pool, 'release')) return false;
  if (!used?.some(({ resource }) => resource === connection)) return false;
  next.leave();
  next.resolve(connection);
  return true;
}

function isHeard(emitter: EventEmitter): boolean {
  return EVENTS.some((event) => emitter.listenerCount(event) > 0);
}
const EVENTS = ['acquireRequest', 'acquireSuccess', 'acquireFail', 'release'];

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
  const { free, used, pendingCreates, pendingAcquires, emitter, max, acquireTimeoutMillis } = pool;
  const hasLists = [free, used, pendingCreates, pendingAcquires].every(Array.isArray);
  const hasNumbers = [max, acquireTimeoutMillis].every(Number.isFinite);
  return hasLists && hasNumbers && typeof emitter?.listenerCount === 'function' && 'interval' in pool;
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
