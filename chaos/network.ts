import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net';
import { setImmediate as nextTurn, setTimeout as sleep } from 'node:timers/promises';
import { MessageReader, type WireMessage } from '../__tests__/support/wire-messages';
import type { Random } from './random';

/**
 * What may happen to a COMMIT:
 * - `lose`: the connection dies before the server hears of it;
 * - `lose answer`: the server commits, and the connection dies before the client hears of that;
 * - `swallow answer`: the server commits, and nothing is heard of that connection any more.
 */
export type CommitFate = 'lose' | 'lose answer' | 'swallow answer';

/** A TCP proxy in front of PostgreSQL that can be every kind of bad network. */
export class Network {
  /** The database's URL through this network. */
  url = '';
  /** Each piece of data takes up to that long. */
  delayMs = 0;
  isSlicing = false;
  /** What the next COMMITs will meet. */
  readonly commitFates: CommitFate[] = [];
  private readonly links = new Set<Link>();
  private readonly server: Server;
  private blackHole: PromiseWithResolve | undefined;
  private healing = promiseWithResolve();

  constructor(
    private readonly databaseUrl: string,
    private readonly random: Random,
  ) {
    const target = new URL(databaseUrl);
    this.server = createServer((client) => {
      const link = new Link(this, client.setNoDelay(true), connect({ host: target.hostname, port: Number(target.port), noDelay: true }));
      this.links.add(link);
      link.closed.then(() => this.links.delete(link));
    });
  }

  async start(): Promise<void> {
    this.server.listen(0, '127.0.0.1');
    await once(this.server, 'listening');
    const url = new URL(this.databaseUrl);
    url.port = String((this.server.address() as AddressInfo).port);
    this.url = url.href;
  }

  cutOne(): void {
    if (this.links.size > 0) this.random.pick([...this.links]).cut();
  }

  cutAll(): void {
    for (const link of this.links) link.cut();
  }

  /** Nothing passes, and no connection ends, until then. What is under way comes later, as TCP sends it again. */
  swallowAll(): void {
    this.blackHole ??= promiseWithResolve();
  }

  letPass(): void {
    this.blackHole?.resolve();
    this.blackHole = undefined;
  }

  heal(): void {
    this.delayMs = 0;
    this.isSlicing = false;
    this.commitFates.length = 0;
    this.letPass();
    this.healing.resolve();
    this.healing = promiseWithResolve();
  }

  async close(): Promise<void> {
    const closed = new Promise((resolve) => this.server.close(resolve));
    this.heal();
    await nextTurn();
    this.cutAll();
    await closed;
  }

  get healed(): Promise<void> {
    return this.healing.promise;
  }

  async carry(to: Socket, bytes: Buffer): Promise<void> {
    if (bytes.length === 0) return;
    if (this.delayMs > 0) await sleep(this.random.between(0, this.delayMs));
    const sliceLength = this.isSlicing && bytes.length < 2_000 ? this.random.between(1, 30) : bytes.length;
    for (let start = 0; start < bytes.length; start += sliceLength) {
      while (this.blackHole) await this.blackHole.promise;
      if (to.destroyed) throw new Error('The other side is gone.');
      if (start > 0) await nextTurn();
      if (!to.write(bytes.subarray(start, start + sliceLength))) await drained(to);
    }
  }
}

/** One client's connection and its counterpart to the server. */
class Link {
  readonly closed: Promise<unknown>;
  private commitFate: CommitFate | undefined;
  /** The client hears nothing any more, not even of the connection's end. */
  private isSwallowed = false;

  constructor(
    private readonly network: Network,
    private readonly client: Socket,
    private readonly server: Socket,
  ) {
    this.closed = Promise.all([client, server].map(closeOf));
    for (const socket of [client, server]) socket.on('error', () => this.cut());
    void this.pump(new MessageReader('frontend', 0), client, server);
    void this.pump(new MessageReader('backend', 0), server, client);
  }

  cut(): void {
    if (this.isSwallowed) return;
    this.client.destroy();
    this.server.destroy();
  }

  private async pump(reader: MessageReader, from: Socket, to: Socket): Promise<void> {
    try {
      for await (const chunk of from) {
        const passing: Buffer[] = [];
        for (const message of reader.read(chunk as Buffer)) {
          const fate = this.meets(message);
          if (fate === 'lose' || fate === 'lose answer') return this.cut();
          if (fate === 'swallow answer') await this.swallow();
          passing.push(message.bytes);
        }
        await this.network.carry(to, Buffer.concat(passing));
      }
      to.end();
    } catch {
      this.cut();
    }
  }

  private async swallow(): Promise<void> {
    this.isSwallowed = true;
    await Promise.race([this.network.healed, closeOf(this.client)]);
    this.isSwallowed = false;
  }

  /** The fate of a COMMIT, at the message that suffers it. */
  private meets({ side, type, text }: WireMessage): CommitFate | undefined {
    if (side === 'frontend') {
      if (type !== 'Q' || !text.startsWith('COMMIT')) return undefined;
      this.commitFate = this.network.commitFates.shift();
      return this.commitFate === 'lose' ? 'lose' : undefined;
    }
    if ((type !== 'C' && type !== 'E') || this.commitFate === undefined) return undefined;
    const fate = this.commitFate;
    this.commitFate = undefined;
    return fate;
  }
}

type PromiseWithResolve = ReturnType<typeof promiseWithResolve>;

function promiseWithResolve() {
  let resolve = () => {};
  const promise = new Promise<void>((resolveIt) => {
    resolve = resolveIt;
  });
  return { promise, resolve };
}

function closeOf(socket: Socket): Promise<unknown> {
  return new Promise((resolve) => socket.once('close', resolve));
}

function drained(socket: Socket): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      socket.off('drain', done).off('close', done);
      resolve();
    };
    socket.once('drain', done).once('close', done);
  });
}
