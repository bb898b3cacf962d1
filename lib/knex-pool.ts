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
    this.end(error);
  }

  /** When the pool is destroyed: tarn goes through its queue, which nobody must leave meanwhile. */
  abort(): void {
    this.end(new Error('aborted'));
  }

  private end(error: unknown): void {
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

/** The first pool of each client: `knex.initialize()` makes another one, of options that the client does not show. */
const firstPools = new WeakMap<Knex.Client, { readonly pool: Tarn; readonly isPlain: boolean }>();

/** Whether client and pool are as Knex makes them, and the pool has no options that ask more of a connection. */
function isPlain(client: Knex.Client, pool: Tarn): boolean {
  let first = firstPools.get(client);
  if (first === undefined) {
    first = { pool, isPlain: isTarn(pool) && hasKnownOptions(client.config) && isKnexOwn(client, ASKED) };
    firstPools.set(client, first);
  }
  // Somebody may put methods of his own in between at any time.
  return first.isPlain && first.pool === pool && !Object.hasOwn(pool, 'acquire') && !Object.hasOwn(client, 'acquireConnection');
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

/** Whether neither the client, nor a class that was made of Knex's, has its own way. */
export function isKnexOwn(client: Knex.Client, methods: readonly string[]): boolean {
  const chain: object[] = [];
  for (let one: object | null = client; one; one = Object.getPrototypeOf(one)) chain.push(one);
  return methods.every((name) => chain.filter((one) => Object.hasOwn(one, name)).length === 1);
}

const ASKED = ['acquireConnection', 'validateConnection'];

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
