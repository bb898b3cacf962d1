import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Socket } from 'node:net';
import { MessageReader, type WireMessage } from './wire-messages';

export type { WireMessage };

/**
 * What to do about a message:
 * 1. nothing: it passes on;
 * 2. a promise: it, and all after it, wait;
 * 3. `'cut-before'`: the connection dies instead, and the receiver never sees the message;
 * 4. `'cut-after'`: it passes on with the rest of its group (up to Sync), and the connection dies before any answer to it.
 */
export type WireHook = (message: WireMessage) => WireDecision | Promise<WireDecision>;
// biome-ignore lint/suspicious/noConfusingVoidType: a hook that only looks returns nothing
export type WireDecision = 'cut-before' | 'cut-after' | undefined | void;

export interface WireProxy {
  /** The database's URL, through the proxy. */
  url: string;
  /** What clients sent since the start or the last `reset`, without start-up and authentication. */
  readonly frontend: readonly WireMessage[];
  /** The SQL in it, in order. */
  sql(): string[];
  /** How often a client had to wait: the direction turned from client to server to server to client. */
  roundTrips(): number;
  reset(): void;
  onFrontend(hook: WireHook | undefined): void;
  onBackend(hook: WireHook | undefined): void;
  /** A dead network: nothing passes in either direction, and no socket closes, until `resume`. */
  pause(): void;
  resume(): void;
  /** The connections end at once, without a word, or with a RST; new ones are possible. */
  cut(how?: 'reset'): void;
  connections(): number;
  close(): Promise<void>;
}

/** A TCP proxy in front of PostgreSQL, to see and to disturb what goes over the wire. */
export async function startWireProxy(databaseUrl: string): Promise<WireProxy> {
  const target = new URL(databaseUrl);
  const links = new Set<Link>();
  const shared: Shared = { frontend: [], roundTrips: 0, gate: undefined, onFrontend: undefined, onBackend: undefined };
  let openGate = () => {};
  let count = 0;

  const server = createServer((client) => {
    const upstream = connect({ host: target.hostname, port: Number(target.port || 5432), noDelay: true });
    const link = new Link(++count, client.setNoDelay(true), upstream, shared);
    links.add(link);
    link.closed.then(() => links.delete(link));
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const url = new URL(databaseUrl);
  url.host = `127.0.0.1:${(server.address() as AddressInfo).port}`;

  const cut = (how?: 'reset') => {
    for (const link of links) link.cut(how);
  };
  return {
    url: url.href,
    get frontend() {
      return shared.frontend;
    },
    sql: () => shared.frontend.filter(({ type }) => type === 'Q' || type === 'P').map(({ text }) => text),
    roundTrips: () => shared.roundTrips,
    reset() {
      shared.frontend = [];
      shared.roundTrips = 0;
    },
    onFrontend(hook) {
      shared.onFrontend = hook;
    },
    onBackend(hook) {
      shared.onBackend = hook;
    },
    pause() {
      shared.gate ??= new Promise((resolve) => {
        openGate = resolve;
      });
    },
    resume() {
      shared.gate = undefined;
      openGate();
    },
    cut,
    connections: () => links.size,
    async close() {
      shared.gate = undefined;
      openGate();
      const closed = new Promise((resolve) => server.close(resolve));
      cut();
      await closed;
    },
  };
}

interface Shared {
  frontend: WireMessage[];
  roundTrips: number;
  gate: Promise<void> | undefined;
  onFrontend: WireHook | undefined;
  onBackend: WireHook | undefined;
}

/** One client's connection and its counterpart to the server. */
class Link {
  readonly closed: Promise<unknown>;
  private isStarted = false;
  private isWaitingForAnswer = false;
  private isDeaf = false;

  constructor(
    id: number,
    private readonly client: Socket,
    private readonly server: Socket,
    private readonly shared: Shared,
  ) {
    this.closed = Promise.all([client, server].map((socket) => new Promise((resolve) => socket.once('close', resolve))));
    for (const socket of [client, server]) socket.on('error', () => this.cut());
    void this.pump(new MessageReader('frontend', id), client, server, (message) => this.fromClient(message));
    void this.pump(new MessageReader('backend', id), server, client, (message) => this.fromServer(message));
  }

  cut(how?: 'reset'): void {
    if (how === 'reset') this.client.resetAndDestroy();
    else this.client.destroy();
    this.server.destroy();
  }

  private async pump(reader: MessageReader, from: Socket, to: Socket, judge: (message: WireMessage) => Verdict): Promise<void> {
    let isLastGroup = false;
    try {
      for await (const chunk of from) {
        // Messages that came together go on together, unless a hook or the gate holds one of them back.
        let passing: Buffer[] = [];
        for (const message of reader.read(chunk as Buffer)) {
          let verdict = judge(message);
          // Not `instanceof`: promises of Node's own modules come from outside of Jest's sandbox.
          if (typeof verdict === 'object' || this.shared.gate) {
            await send(to, passing);
            passing = [];
            verdict = await verdict;
            while (this.shared.gate) await this.shared.gate;
          }
          if (verdict === 'drop') continue;
          if (verdict === 'cut-before') return this.cut();
          passing.push(message.bytes);
          isLastGroup ||= verdict === 'cut-after';
          if (isLastGroup && endsGroup(message)) return this.cutBehind(to, passing);
        }
        await send(to, passing);
      }
      to.end();
    } catch {
      this.cut();
    }
  }

  private fromClient(message: WireMessage): Verdict {
    if (message.type === 'SSLRequest' || message.type === 'GSSENCRequest') {
      this.client.write('N');
      return 'drop';
    }
    if (!this.isStarted && message.type !== 'CancelRequest') return undefined;
    this.shared.frontend.push(message);
    this.isWaitingForAnswer = true;
    return this.shared.onFrontend?.(message);
  }

  private fromServer(message: WireMessage): Verdict {
    if (this.isDeaf) return 'drop';
    if (!this.isStarted) {
      this.isStarted = message.type === 'Z';
      return undefined;
    }
    if (this.isWaitingForAnswer) {
      this.isWaitingForAnswer = false;
      this.shared.roundTrips++;
    }
    return this.shared.onBackend?.(message);
  }

  /** The receiver gets its bytes and then FIN: destroying its socket at once could take them back by a RST. */
  private cutBehind(receiver: Socket, bytes: Buffer[]): void {
    this.isDeaf = true;
    receiver.end(Buffer.concat(bytes));
    const other = receiver === this.client ? this.server : this.client;
    other.destroy();
  }
}

type Verdict = ReturnType<WireHook> | 'drop';

/** A client's group ends with Sync or Query: only then does the server act on it. Each answer is a group. */
function endsGroup({ side, type }: WireMessage): boolean {
  return side === 'backend' || type === 'Q' || type === 'S';
}

async function send(to: Socket, buffers: Buffer[]): Promise<void> {
  if (buffers.length === 0) return;
  if (to.destroyed) throw new Error('The other side is gone.');
  if (to.write(Buffer.concat(buffers))) return;
  await new Promise<void>((resolve) => {
    const done = () => {
      to.off('drain', done).off('close', done);
      resolve();
    };
    to.once('drain', done).once('close', done);
  });
}
