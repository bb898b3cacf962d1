import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Socket } from 'node:net';

/**
 * What becomes of a CancelRequest:
 * 1. `'pass'`: the server gets it, and closes the connection;
 * 2. `'refuse'`: its connection is reset at once;
 * 3. `'swallow'`: the server never gets it, and the connection stays open;
 * 4. `'keep open'`: the server gets it, and the connection stays open all the same;
 * 5. a promise: the server gets it then.
 */
export type CancelFate = 'pass' | 'refuse' | 'swallow' | 'keep open' | Promise<void>;

export interface CancelProxy {
  /** The database's URL, through the proxy. */
  url: string;
  /** For each CancelRequest that comes. */
  fate: CancelFate | (() => CancelFate);
  /** How many have come; one over TLS cannot be told from another connection. */
  cancels: number;
  /** With what each connection has begun. */
  readonly openings: ('CancelRequest' | 'SSLRequest' | 'TLS' | 'startup')[];
  /** Connections of cancels that are open. */
  open(): number;
  close(): Promise<void>;
}

/** A TCP proxy in front of PostgreSQL that disturbs cancels, and nothing else. */
export async function startCancelProxy(databaseUrl: string): Promise<CancelProxy> {
  const target = new URL(databaseUrl);
  const sockets = new Set<Socket>();
  const cancelSockets = new Set<Socket>();
  const track = (socket: Socket): Socket => {
    sockets.add(socket);
    socket.on('error', () => {});
    socket.once('close', () => sockets.delete(socket));
    return socket;
  };
  const toServer = (): Socket => track(connect({ host: target.hostname, port: Number(target.port), noDelay: true }));

  const cancel = async (client: Socket, bytes: Buffer): Promise<void> => {
    proxy.cancels++;
    cancelSockets.add(client);
    client.once('close', () => cancelSockets.delete(client));
    const fate = typeof proxy.fate === 'function' ? proxy.fate() : proxy.fate;
    if (fate === 'refuse') client.resetAndDestroy();
    if (fate === 'refuse' || fate === 'swallow') return;
    if (typeof fate === 'object') await fate;
    const server = toServer();
    // PgBouncer 1.18 dies of one that closes its side first.
    server.write(bytes);
    server.resume();
    await once(server, 'close');
    if (fate !== 'keep open') client.end();
  };

  const listener = createServer({ noDelay: true }, (client) => {
    track(client).once('data', (first: Buffer) => {
      const opening = openingOf(first);
      proxy.openings.push(opening);
      if (opening === 'CancelRequest') {
        client.resume();
        void cancel(client, first);
        return;
      }
      const server = toServer();
      server.write(first);
      client.pipe(server);
      server.pipe(client);
      client.once('close', () => server.destroy());
      server.once('close', () => client.destroy());
    });
  });
  listener.listen(0, '127.0.0.1');
  await once(listener, 'listening');
  const url = new URL(databaseUrl);
  url.host = `127.0.0.1:${(listener.address() as AddressInfo).port}`;

  const proxy: CancelProxy = {
    url: url.href,
    fate: 'pass',
    cancels: 0,
    openings: [],
    open: () => cancelSockets.size,
    async close() {
      const closed = new Promise((resolve) => listener.close(resolve));
      for (const socket of sockets) socket.destroy();
      await closed;
    },
  };
  return proxy;
}

function openingOf(bytes: Buffer): CancelProxy['openings'][number] {
  if (bytes[0] === TLS_HANDSHAKE) return 'TLS';
  const code = bytes.length >= 8 ? bytes.readInt32BE(4) : undefined;
  return code === 80877102 ? 'CancelRequest' : code === 80877103 ? 'SSLRequest' : 'startup';
}

const TLS_HANDSHAKE = 22;
