import { settledWithin } from './deadline';
import { isReady, type PgConnection, type Wire, whenReady } from './postgres';

/**
 * Cancels what runs on a connection, and asks again until it has ended: a request that comes before the server has begun the
 * statement does nothing.
 *
 * Resolves when the connection is ready (or lost) **and** no cancel is under way any more: one that comes late would hit the next
 * borrower of the connection. Waits as long as that takes, so the caller bounds it, and destroys the connection then.
 *
 * @param streamOption pg's `stream`, as the application has configured it
 * @param end of the statement, if others may run on the connection after it; must not reject
 */
export async function cancelUntilReady(pg: PgConnection, streamOption: unknown, end: Promise<unknown> = whenReady(pg)): Promise<void> {
  let hasEnded = isReady(pg);
  const ended = end.then(() => {
    hasEnded = true;
  });
  for (let pauseMs = 50; !hasEnded; pauseMs = Math.min(pauseMs * 2, 1_000)) {
    // A `stream` function of the application may throw.
    await requestCancel(pg, streamOption).catch(() => {});
    await settledWithin(pauseMs, ended);
  }
}

/**
 * Sends PostgreSQL's CancelRequest: 16 bytes on a connection of their own (protocol-flow, "Canceling Requests in Progress"). Unlike
 * `pg_cancel_backend`, it works behind PgBouncer, and needs no login.
 *
 * 1. The way in is that of the connection: the same address, TLS, Unix socket or `stream` function.
 * 2. Resolves when the server has closed it: then the signal has been delivered. Closing it first would end PgBouncer 1.18 (its
 *    issues #801 and #846).
 * 3. Never rejects: whether it was of any use shows on the connection that is to be cancelled.
 */
function requestCancel(pg: PgConnection, streamOption: unknown): Promise<void> {
  const { connection: wire, processID, secretKey, ssl, sslNegotiation, host, port } = pg;
  const isReachable = streamOption === undefined || typeof streamOption === 'function';
  if (wire === undefined || typeof secretKey !== 'number' || !isReachable) return Promise.resolve();

  return new Promise((resolve) => {
    // pg's own class, which knows how to begin TLS; its `client.cancel()` does not wait for that.
    const own = new (wire.constructor as WireClass)({ stream: streamOption, ssl, sslNegotiation });
    let isSent = false;
    const send = (): void => {
      isSent = true;
      own.cancel(processID as number, secretKey);
    };
    own.on('connect', () => {
      if (!ssl) send();
      else if (sslNegotiation !== 'direct') own.requestSsl();
    });
    own.on('sslconnect', send);
    own.on('error', () => {
      if (isSent) return; // The end follows.
      own.stream.destroy();
      resolve();
    });
    own.on('end', () => resolve());

    if (host.startsWith('/')) own.connect(`${host}/.s.PGSQL.${port}`);
    else {
      if (streamOption === undefined) connectTo(own.stream, wire.stream.remoteAddress);
      own.connect(port, host);
    }
    // On a dead network nothing ever ends it, and nobody waits for it any more by then.
    own.stream.setTimeout?.(DEAD_AFTER_MS, () => own.stream.destroy());
    own.stream.unref?.();
  });
}

/** A host name may stand for several servers; as libpq does, the cancel goes to the one that the connection has reached. */
function connectTo(stream: WireStream, address: string | undefined): void {
  if (address === undefined) return;
  const { connect } = stream;
  stream.connect = (port) => connect.call(stream, port, address);
}

const DEAD_AFTER_MS = 60_000;

type WireStream = CancelWire['stream'];

/** pg's `Connection`, as far as a cancel uses it. */
interface CancelWire extends Wire {
  readonly stream: Wire['stream'] & {
    connect(port: unknown, host?: string): unknown;
    setTimeout?(ms: number, onTimeout: () => void): unknown;
    unref?(): void;
  };
  on(event: string, listener: (...args: any[]) => void): unknown;
  connect(port: number | string, host?: string): void;
  requestSsl(): void;
  cancel(processID: number, secretKey: number): void;
}
type WireClass = new (config: { stream: unknown; ssl: unknown; sslNegotiation: unknown }) => CancelWire;
