import type { EventEmitter } from 'node:events';
import type { Transform } from 'node:stream';
import type { Knex } from 'knex';
import type { Wish } from './acquisition';
import type { Beginning, Settings } from './beginning';
import { type Connection, type KnexClient, type Pool, PooledConnection } from './connection';
import { bindToContext, outsideOfContext, runUnitInContext } from './context';
import { SessionError } from './errors';
import { publishDestroyed } from './events';
import type { HookKind } from './hooks';
import { handOver, isKnexOwn, queueForConnection, takeFreeConnection } from './knex-pool';
import { stackOfCaller } from './origin';
import { OuterTransaction } from './outer-transaction';
import { endAtOnce, type PgConnection, type Statement } from './postgres';
import { type Container, Savepoint } from './savepoint';
import type { Scope, SessionScope } from './scope';
import type { Session } from './session';
import type { Lease } from './statement-queue';
import type { TransactionOwner } from './transaction-owner';

/**
 * How a session looks like Knex. The file that knows Knex's inside (scoped-face.ts makes a variant of it):
 *
 * - A Knex function is a function with a `context`; all its methods go through `this.context.client`. So a session is a small
 *   function whose prototype is a Knex function, with a context and a client of its own: no copying for each request.
 * - A Knex client's `acquireConnection`, `releaseConnection`, `query`, `stream` and `transaction` are all that Knex's builders
 *   call to reach the database. All five are ours.
 */
export class KnexFace {
  private readonly template: Knex;
  private readonly sessionPrototype: object;
  private readonly clientPrototype: object;
  private readonly contextPrototype: object;
  private pool: Pool | undefined;

  private constructor(private readonly knex: Knex | Knex.Transaction) {
    // A clone with shortcuts for the methods of QueryBuilder.extend too; a transaction was made late enough to have them.
    const template: Knex = knex.isTransaction ? knex : knex.withUserParams(knex.userParams);
    this.template = template;
    this.sessionPrototype = Object.create(template, sessionProperties);
    this.contextPrototype = Object.create(contextOf(template), contextProperties(knex));
    this.clientPrototype = Object.create(knex.client, clientProperties(knex));
  }

  /** Made with the first session of a Knex instance, and kept as long as it. */
  static of(knex: Knex): KnexFace {
    let face = faces.get(knex);
    if (face === undefined) {
      face = new KnexFace(knex);
      faces.set(knex, face);
    }
    return face;
  }

  /** Gives a level of a session its client and its face. */
  dress(scope: Scope): void {
    const client = Object.create(this.clientPrototype) as SessionClient;
    client.scope = scope;
    client.knexFace = this;
    scope.client = client;
    scope.face = this.faceOf(client, this.sessionPrototype) as unknown as Session;
  }

  /** Notes where a session is first used: when a builder is awaited, whoever has made it is not on the stack any more. */
  noteFirstUse({ client }: Scope): void {
    const session = client as SessionClient & Record<string, unknown>;
    for (const name of MAKERS) {
      session[name] = (...args: unknown[]): unknown => {
        session.firstUse ??= stackOfCaller();
        for (const own of MAKERS) delete session[own];
        return (session[name] as (...args: unknown[]) => unknown)(...args);
      };
    }
  }

  /** The stack, if that was to be noted. */
  firstUseOf({ client }: Scope): string | undefined {
    return (client as SessionClient).firstUse;
  }

  /** A Knex function over a client that differs from the application's by these properties. */
  faceOver(properties: PropertyDescriptorMap): Record<string, unknown> {
    return this.faceOf(Object.create(this.clientPrototype, properties), this.template) as Record<string, unknown>;
  }

  private faceOf(client: SessionClient, prototype: object): object {
    const context = Object.create(this.contextPrototype) as Context;
    context.client = client;
    const session = (tableName?: unknown, options?: unknown): unknown => {
      const builder = context.queryBuilder();
      if (tableName) return builder.table(tableName, options);
      client.logger.warn('calling knex without a tableName is deprecated. Use knex.queryBuilder() instead.');
      return builder;
    };
    // First: a property that comes after another prototype costs a hidden class of its own (object-shape.ts).
    session.context = context;
    return Object.setPrototypeOf(session, prototype);
  }

  /** The pool as it is now: `knex.destroy()` makes Knex forget it, and `knex.initialize()` makes another. */
  private poolOf(client: Knex.Client): Pool {
    const pool = client.pool as PoolOfKnex;
    if (this.pool?.source !== pool) {
      this.pool = {
        source: pool,
        client,
        release: (connection, reason, { scope }: SessionClient) => {
          if (reason !== undefined) {
            // It is written to Knex's log, so it is not the reason itself, which may hold SQL and has been told to whom it concerns.
            connection.__knex__disposed ??= new Error('A session that failed has destroyed its connection.');
            endAtOnce(connection);
            publishDestroyed(scope.transaction.owner, reason);
          }
          // It may open another one for those who wait.
          if (!handOver(connection, pool)) outsideOfContext(() => pool.release(connection));
        },
        sendsAsKnex: isKnexOwn(client, ['_query']),
        get streamOption() {
          return streamOptionOf(client);
        },
      };
    }
    return this.pool;
  }

  /** The transaction that stands for Knex, if there is one. */
  get outer(): Knex.Transaction | undefined {
    return this.knex.isTransaction ? (this.knex as Knex.Transaction) : undefined;
  }

  /** A connection of the pool that can be had at once. */
  take(scope: Scope, beginning: Beginning): Connection | undefined {
    const pg = this.outer ? undefined : takeFreeConnection(this.knex.client);
    return pg && this.cleanOne(pg, scope, beginning);
  }

  private cleanOne(pg: PgConnection, scope: Scope, beginning: Beginning, isWanted = true): Connection | undefined {
    const connection = new PooledConnection(pg, this.poolOf(this.knex.client), scope.client, scope.txid, beginning);
    if (connection.isClean || !isWanted) return connection;
    // Knex's own transactions may leave one busy, or in a transaction, and our COMMIT would commit that.
    connection.release();
    return undefined;
  }

  /** Takes a connection from the pool, or a savepoint in the transaction that stands for Knex. */
  async connect(scope: Scope, wish: Wish, beginning: Beginning): Promise<Connection> {
    if (this.outer) return OuterTransaction.join(this.outer, scope.client, streamOptionOf(this.outer.client), beginning);
    for (;;) {
      const pg = await this.pgFor(wish);
      const connection = this.cleanOne(pg, scope, beginning, wish.isWanted);
      if (connection) return connection;
    }
  }

  private pgFor(wish: Wish): Promise<PgConnection> {
    const place = queueForConnection(this.knex.client, wish.patience);
    if (place === undefined) return outsideOfContext(() => this.knex.client.acquireConnection());
    wish.onUnwanted = () => place.leave();
    return place.promise;
  }
}

/** tarn's, or Knex's face of a pg.Pool: what `client.releaseConnection` passes on to. */
interface PoolOfKnex {
  release(connection: PgConnection): unknown;
}

const faces = new WeakMap<Knex, KnexFace>();

interface Context {
  client: SessionClient;
  queryBuilder(): { table(name: unknown, options: unknown): unknown };
}

interface SessionClient extends KnexClient {
  scope: Scope;
  knexFace: KnexFace;
  readonly logger: { warn(message: string): void };
  readonly _events: unknown;
  firstUse?: string;
}

/** What Knex's builders come from. */
const MAKERS = ['queryBuilder', 'raw', 'schemaBuilder', 'transaction'] as const;

/** Whether a value is a session, also one of another copy of this package. */
export function isSession(value: unknown): value is Session {
  return typeof value === 'function' && (contextOf(value) as Context | undefined)?.client?.scope?.face === value;
}

/** Whoever the session was made for. */
export function ownerOf(value: unknown): TransactionOwner | undefined {
  return isSession(value) ? scopeOf(value).transaction.owner : undefined;
}

/** pg's `stream`: in Knex's `connection`, or in the pg.Pool that it was given. */
export function streamOptionOf(client: Knex.Client): unknown {
  const { connectionSettings, config } = client as { connectionSettings?: Streamed; config: { connectionPool?: { options?: Streamed } } };
  return connectionSettings?.stream ?? config.connectionPool?.options?.stream;
}

interface Streamed {
  readonly stream?: unknown;
}

function contextOf(knex: unknown): object {
  return (knex as { context: object }).context;
}

function clientOf(face: unknown): SessionClient {
  return (contextOf(face) as Context).client;
}

export function scopeOf(face: unknown): Scope {
  return clientOf(face).scope;
}

function rootOf(face: unknown): SessionScope {
  return scopeOf(face).root as SessionScope;
}

/** Of what gave the lease: a checkpoint may have put another one in its place. A foreign connection is for the session to refuse. */
function transactionOf({ scope }: SessionClient, { transaction }: Partial<Lease>) {
  return transaction ?? scope.transaction;
}

/** What a session's client does in its own way; everything else is inherited from the application's client. */
function clientProperties(knex: Knex): PropertyDescriptorMap {
  const inherited = knex.client as KnexClient & EventEmitter;
  return Object.getOwnPropertyDescriptors({
    // Knex's mark of a client that `.transacting()` takes.
    transacting: true,
    // Listeners must not end up on the application's client.
    _events: undefined,
    _eventsCount: 0,

    acquireConnection(this: SessionClient): Promise<Lease> {
      return this.scope.lease();
    },
    releaseConnection(this: SessionClient, lease: Lease | undefined): Promise<void> {
      // Before 3.3, Knex also gives back what its stream has never got.
      if (lease !== undefined) transactionOf(this, lease).returnLease(lease);
      return Promise.resolve();
    },
    query(this: SessionClient, lease: Lease, statement: Statement | string): Promise<unknown> {
      const asked = typeof statement === 'string' ? { sql: statement } : statement;
      return transactionOf(this, lease).query(lease, this, asked);
    },
    stream(this: SessionClient, lease: Lease, statement: Statement, stream: Transform, options: unknown) {
      bindToContext(stream);
      return transactionOf(this, lease).stream(lease, this, statement, stream, options);
    },
    transaction(this: SessionClient, container: Container, config: Knex.TransactionConfig = {}): Promise<unknown> {
      this.scope.decide();
      if (this.scope.transaction.isAutocommit) return knex.client.transaction(container, config);
      const { isChosen } = this.scope.transaction.owner;
      // What is called in there, and is handed nothing, belongs to it.
      const inContext = (session: Session): unknown =>
        runUnitInContext({ knex: knex as Knex, isChosen, session }, () => container(session));
      return Savepoint.open(this.scope, inContext, config, (savepoint) => this.knexFace.dress(savepoint));
    },
    /** For `.timeout(ms, { cancel: true })`: its error need not wait for the statement's end, the next statement does. */
    cancelQuery(lease: Lease): Promise<void> {
      // Knex's timer may pass when the statement is over, and its caller has not been told.
      if (lease.isRunning) void lease.connection.cancel();
      return Promise.resolve();
    },
    destroy: refuseDestroy,
    initializePool: refuseDestroy,

    /** Listeners on the level hear its statements, then those on the levels above it, then those on the application's Knex. */
    emit(this: SessionClient, event: string, ...values: unknown[]): boolean {
      const { scope } = this;
      const face = scope.face as unknown as EventEmitter & { _events: unknown };
      if (face._events !== undefined) face.emit(event, ...values);
      if (this._events !== undefined) inherited.constructor.prototype.emit.call(this, event, ...values);
      if (scope.parent) return scope.parent.client.emit(event, ...values);
      // The outer transaction's own client tells of the statements that run in it.
      if (knex.isTransaction && (event === 'query' || event === 'query-error')) return true;
      return inherited.emit(event, ...values);
    },
  });
}

const contextProperties = (knex: Knex): PropertyDescriptorMap => ({
  userParams: {
    get: () => knex.userParams,
    set(value: unknown) {
      Object.defineProperty(this, 'userParams', { value, writable: true });
    },
  },
  withUserParams: { value: refuseUserParams },
  // Knex's, as a Knex instance has it: that of an outer Knex.Transaction takes no configuration without a callback.
  transaction: {
    value(this: { _transaction(...args: unknown[]): unknown }, container: unknown, config?: object) {
      return typeof container === 'object' && !config
        ? this._transaction(null, container ?? {})
        : this._transaction(container, config ?? {});
    },
  },
});

/** What a session has beyond, or unlike, a Knex function. Getters give functions that work when passed on, as Knex's do. */
const sessionProperties: PropertyDescriptorMap = hidden({
  isTransaction: true,
  // Listeners and Objection's bound models belong to one session, never to the prototype of all.
  _events: undefined,
  _eventsCount: 0,
  $$objection: undefined,

  get commit() {
    const scope = scopeOf(this);
    return (value?: unknown) => scope.commit(value);
  },
  get rollback() {
    const scope = scopeOf(this);
    return (error?: unknown) => scope.rollback(error);
  },
  get savepoint() {
    const { face } = scopeOf(this);
    return (container: Container, config?: Knex.TransactionConfig) => face.transaction(container as never, config);
  },
  get isCompleted() {
    const scope = scopeOf(this);
    return () => scope.isCompleted();
  },
  get executionPromise() {
    return scopeOf(this).executionPromise;
  },
  get parentTransaction() {
    const { scope, knexFace } = clientOf(this);
    return scope.parent?.face ?? knexFace.outer;
  },

  get outcome() {
    return rootOf(this).outcome;
  },
  get signal() {
    return scopeOf(this).transaction.signal;
  },
  get beforeCommit() {
    return hookOf(this, 'beforeCommit');
  },
  get afterCommit() {
    return hookOf(this, 'afterCommit');
  },
  get afterRollback() {
    return hookOf(this, 'afterRollback');
  },
  get checkpoint() {
    const scope = scopeOf(this);
    return () => scope.checkpoint();
  },
  get set() {
    const scope = scopeOf(this);
    return (settings: Settings) => scope.set(settings);
  },
  setRollbackOnly(reason?: unknown): void {
    scopeOf(this).transaction.setRollbackOnly(reason);
  },

  destroy: refuseDestroy,
  initialize: refuseDestroy,
  save: refuseLogin,
  regenerate: refuseLogin,
  reload: refuseLogin,
  touch: refuseLogin,
  get cookie() {
    return refuseLogin();
  },
});

function hookOf(face: unknown, kind: HookKind) {
  const scope = scopeOf(face);
  return (hook: unknown): void => scope.addHook(kind, hook);
}

function hidden(properties: object & ThisType<object>): PropertyDescriptorMap {
  const descriptors = Object.getOwnPropertyDescriptors(properties) as PropertyDescriptorMap;
  for (const descriptor of Object.values(descriptors)) {
    descriptor.enumerable = false;
    if ('value' in descriptor) descriptor.writable = true;
  }
  return descriptors;
}

function refuseUserParams(): never {
  throw new Error('Cannot set user params on a transaction - it can only inherit params from main knex instance');
}

export function refuseDestroy(): never {
  throw new SessionError(
    'ERR_SESSION_DESTROY',
    'A database session has no connection pool to destroy or initialize. It ends with the request; ' +
      'end it earlier by session.commit() or session.rollback(). ' +
      'To log a user out, call destroy() on the session of express-session.',
  );
}

function refuseLogin(): never {
  throw new SessionError(
    'ERR_NOT_A_LOGIN_SESSION',
    'This is a database session, not a login session of express-session. ' +
      "To have both, attach this one elsewhere: sessionMiddleware(knex, { property: 'db' }).",
  );
}
