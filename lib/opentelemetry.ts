/**
 * For traces: each transaction as a span of OpenTelemetry.
 *
 * @module express-knex-session/opentelemetry
 */
import { type Attributes, diag, type Span, SpanKind, SpanStatusCode, type TracerProvider, trace } from '@opentelemetry/api';
import { describe } from './describe';
import {
  type ConnectionDestroyedMessage,
  type LateUseMessage,
  type OpenLongMessage,
  type SessionChannel,
  sessionChannels,
  type TransactionMessage,
} from './events';
import { isServerError } from './postgres';
import type { Session } from './session';

/** The options of {@link traceSessions}. */
export interface TraceSessionsOptions {
  /**
   * Whose tracer makes the spans.
   *
   * @default the global one, also if it is registered later
   * @example traceSessions({ tracerProvider: provider })
   */
  tracerProvider?: TracerProvider | undefined;
}

/**
 * Makes a span of each transaction of a session, from its wait for a connection to its end.
 *
 * 1. Its parent is the span that was active where the first statement was awaited: that of the request, or of whoever has called
 *    `withSession()`. The spans of statements are its siblings. A checkpoint ends one, and the next statement begins another; so does each
 *    attempt of `retryable()`. There is none for a session that runs no statement, for savepoints, and with `transaction: false`.
 * 2. It is named `transaction <database>`, of kind INTERNAL: much of its time is the handler's, and calls of the database are what it holds.
 *    It has `db.system.name`, `db.namespace`, `server.address` and `server.port`, as far as Knex's configuration tells them, and
 *    `db.operation.name` (`transaction`).
 * 3. At its end come `express_knex_session.outcome` and `.reason`, `.transaction_id` (Knex's `__knexTxId`), `.statements`, `.waited_ms`,
 *    `.held_ms` (none if it got no connection) and `.bytes_held`. See {@link TransactionMessage}.
 * 4. Its status is ERROR, with `error.type` (the error's code, or else its class) and the server's SQLSTATE in `db.response.status_code`, if an
 *    error has ended it, it got no connection, it was open for too long, or its outcome is unknown. It is not if the application has wanted
 *    the rollback (a response, `rollback()`, `setRollbackOnly()`, an error whose `status` is 4xx), or if the client has gone.
 * 5. Its events are `express_knex_session.open`, `.settle`, `.long` and `.destroyed`; `.late` is one of the span that was active where a
 *    session was used after its end. See {@link sessionChannels}.
 * 6. No text of a statement, no value, no message of an error and no password is in any of them.
 * 7. Call it before the first request. Called once more for the same provider, it changes nothing, and returns the same function.
 *
 * @returns stops it; spans that have begun still end. To call it twice does no harm.
 * @throws TypeError for an option that is not what it should be
 * @example
 * const stopTracing = traceSessions();
 */
export function traceSessions(options: TraceSessionsOptions = {}): () => void {
  const tracerProvider = providerIn(options);
  let stop = running.get(tracerProvider);
  if (stop === undefined) {
    const tracing = new SessionTracing(tracerProvider ?? trace);
    stop = () => {
      if (running.get(tracerProvider) === stop) running.delete(tracerProvider);
      tracing.stop();
    };
    running.set(tracerProvider, stop);
    tracing.start();
  }
  return stop;
}

const running = new Map<TracerProvider | undefined, () => void>();

/** That of package.json, which bundlers do not find; a test compares them. */
const VERSION = '0.1.0';

class SessionTracing {
  /** By what is told of the transaction, and by whose it is. */
  private readonly spans = new WeakMap<TransactionMessage | Session, Span>();
  private open = 0;
  private isStopped = false;
  private readonly beginnings: Subscription[];
  private readonly ends: Subscription[];

  constructor(private readonly provider: Pick<TracerProvider, 'getTracer'>) {
    this.beginnings = [subscriptionTo(sessionChannels.acquire, this.onAcquire), subscriptionTo(sessionChannels.late, onLate)];
    this.ends = [
      subscriptionTo(sessionChannels.open, this.onOpen),
      subscriptionTo(sessionChannels.settle, this.onSettle),
      subscriptionTo(sessionChannels.settled, this.onSettled),
      subscriptionTo(sessionChannels.long, this.onLong),
      subscriptionTo(sessionChannels.destroyed, this.onDestroyed),
    ];
  }

  start(): void {
    for (const { subscribe } of [...this.ends, ...this.beginnings]) subscribe();
  }

  /** What has begun is followed to its end: a span that does not end is never exported. */
  stop(): void {
    this.isStopped = true;
    for (const { unsubscribe } of this.beginnings) unsubscribe();
    this.leave();
  }

  private leave(): void {
    if (this.isStopped && this.open === 0) for (const { unsubscribe } of this.ends) unsubscribe();
  }

  private readonly onAcquire = (message: TransactionMessage): void => {
    const server = serverOf(message.session);
    const namespace = server['db.namespace'];
    const span = this.provider
      .getTracer('express-knex-session', VERSION)
      .startSpan(namespace ? `transaction ${namespace}` : 'transaction', {
        kind: SpanKind.INTERNAL,
        attributes: {
          'db.system.name': 'postgresql',
          'db.operation.name': 'transaction',
          ...server,
          [`${OURS}.transaction_id`]: message.id,
        },
      });
    this.spans.set(message, span);
    this.spans.set(message.session, span);
    this.open++;
  };

  private readonly onOpen = (message: TransactionMessage): void => {
    const span = this.spans.get(message);
    if (!span?.isRecording()) return;
    const server = serverOf(message.session);
    // A configuration that is a function has been asked by now.
    span.setAttributes(server);
    if (server['db.namespace']) span.updateName(`transaction ${server['db.namespace']}`);
    span.addEvent(`${OURS}.open`, { [`${OURS}.waited_ms`]: message.waitedMs });
  };

  private readonly onSettle = (message: TransactionMessage): void => {
    this.spans.get(message)?.addEvent(`${OURS}.settle`, { [`${OURS}.decision`]: message.decision });
  };

  private readonly onSettled = (message: TransactionMessage): void => {
    const span = this.spans.get(message);
    if (span === undefined) return;
    this.spans.delete(message);
    if (this.spans.get(message.session) === span) this.spans.delete(message.session);
    const { outcome, reason, statements, waitedMs, heldMs, bytesHeld } = message;
    try {
      span.setAttributes({
        [`${OURS}.outcome`]: outcome,
        [`${OURS}.reason`]: reason,
        [`${OURS}.statements`]: statements,
        [`${OURS}.waited_ms`]: waitedMs,
        [`${OURS}.held_ms`]: heldMs,
        [`${OURS}.bytes_held`]: bytesHeld,
      });
      if (hasFailed(message)) {
        span.setStatus({ code: SpanStatusCode.ERROR });
        span.setAttributes(attributesOf(message.error));
      }
    } finally {
      span.end();
      this.open--;
      this.leave();
    }
  };

  private readonly onLong = ({ transaction, error }: OpenLongMessage): void => {
    this.spans.get(transaction)?.addEvent(`${OURS}.long`, {
      [`${OURS}.open_ms`]: error.ms,
      [`${OURS}.statements`]: transaction.statements,
    });
  };

  private readonly onDestroyed = ({ session, reason }: ConnectionDestroyedMessage): void => {
    const span = this.spans.get(session) ?? trace.getActiveSpan();
    span?.addEvent(`${OURS}.destroyed`, attributesOf(reason));
  };
}

/** By whoever is active: the span of the transaction has ended. */
function onLate({ error }: LateUseMessage): void {
  const span = trace.getActiveSpan();
  if (span?.isRecording()) span.addEvent(`${OURS}.late`, attributesOf(error));
}

const OURS = 'express_knex_session';

interface Subscription {
  subscribe(): void;
  unsubscribe(): void;
}

/** What a listener throws would end the process. */
function subscriptionTo<Message>(channel: SessionChannel<Message>, listener: (message: Message) => void): Subscription {
  const guarded = (message: Message): void => {
    try {
      listener(message);
    } catch (error) {
      diag.error('express-knex-session/opentelemetry has failed', error);
    }
  };
  return { subscribe: () => channel.subscribe(guarded), unsubscribe: () => void channel.unsubscribe(guarded) };
}

function hasFailed({ outcome, reason, error }: TransactionMessage): boolean {
  if (outcome === 'unknown' || reason === 'timeout' || reason === 'shutdown') return true;
  if (reason === 'error') return !isWanted(error);
  return outcome === 'unused' && reason !== 'disconnect' && reason !== 'rollback';
}

/** Whether an error stands for a response that the application wants: it is none of the server's then, as in the span of the request. */
function isWanted(error: unknown): boolean {
  const { status, statusCode } = detailsOf(error);
  const wanted = status ?? statusCode;
  return typeof wanted === 'number' && wanted >= 400 && wanted < 500;
}

/** Of whatever was thrown. */
function detailsOf(error: unknown): { readonly [name in 'code' | 'status' | 'statusCode' | 'cause']?: unknown } {
  return typeof error === 'object' && error !== null ? error : {};
}

/** Codes and names of classes only: messages hold values, and Knex's hold the statement. */
function attributesOf(error: unknown): Attributes {
  return { 'error.type': typeOf(error), 'db.response.status_code': sqlStateOf(error) };
}

function typeOf(error: unknown): string {
  const { code } = detailsOf(error);
  if (typeof code === 'string' && IDENTIFIER.test(code)) return code;
  const name = error instanceof Error ? error.constructor.name : '';
  return IDENTIFIER.test(name) ? name : '_OTHER';
}

const IDENTIFIER = /^\w{1,64}$/;

function sqlStateOf(error: unknown, depth = 0): string | undefined {
  if (isServerError(error)) return error.code;
  const { cause } = detailsOf(error);
  return cause !== undefined && depth < MOST_CAUSES ? sqlStateOf(cause, depth + 1) : undefined;
}

/** They may go round in a circle. */
const MOST_CAUSES = 5;

/** Where it connects to, as the driver reads its settings and the environment. */
function serverOf({ client }: Session): Attributes {
  const settings: unknown = client.connectionSettings;
  if (typeof settings !== 'object' || settings === null) return {};
  let server = servers.get(settings);
  if (server === undefined) {
    const { connectionString } = settings as ConnectionSettings;
    server = attributesOfServer(connectionString ? partsOf(connectionString) : settings);
    servers.set(settings, server);
  }
  return server;
}

function attributesOfServer(settings: ConnectionSettings | undefined): Attributes {
  if (settings === undefined) return {};
  const { host, port, database } = settings;
  const { PGHOST, PGPORT, PGDATABASE } = process.env;
  return {
    'db.namespace': database || PGDATABASE,
    'server.address': host || PGHOST || 'localhost',
    'server.port': Number(port || PGPORT || 5432),
  };
}

interface ConnectionSettings {
  readonly connectionString?: string;
  readonly host?: string;
  readonly port?: number | string;
  readonly database?: string;
}

const servers = new WeakMap<object, Attributes>();

/** None of one that is no URL: which of it is the password is not known then. */
function partsOf(connectionString: string): ConnectionSettings | undefined {
  if (!URL.canParse(connectionString)) return undefined;
  const { protocol, hostname, port, pathname, searchParams } = new URL(connectionString);
  if (!/^postgres(ql)?:$/.test(protocol)) return undefined;
  return { host: searchParams.get('host') ?? decodeURIComponent(hostname), port, database: decodeURI(pathname.slice(1)) };
}

function providerIn(options: TraceSessionsOptions): TracerProvider | undefined {
  if (typeof options !== 'object' || options === null) {
    throw new TypeError(`Expected options to be an object such as { tracerProvider }, got ${describe(options)}.`);
  }
  const { tracerProvider, ...others } = options;
  for (const name of Object.keys(others)) throw new TypeError(`Unknown option \`${name}\`. traceSessions() takes: tracerProvider.`);
  if (tracerProvider !== undefined && typeof tracerProvider?.getTracer !== 'function') {
    throw new TypeError(`Expected \`tracerProvider\` to have a method getTracer(), got ${describe(tracerProvider)}.`);
  }
  return tracerProvider;
}
