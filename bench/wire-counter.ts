import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { MessageReader } from '../__tests__/support/wire-messages';

/** What ends the answer to a Flush, by the message before it: Parse, Bind, Close, Describe, Execute. An error ends them all. */
const answers: Record<string, string> = { P: '1', B: '2', C: '3', D: 'Tn', E: 'CIs' };

/**
 * A TCP proxy in front of PostgreSQL that counts.
 *
 * 1. A round trip begins when the app sends something while no answer is due: what it sends before the answer has come is part of the same one.
 * 2. A connection is held from the first message that finds it idle, until the server has answered all and says that no transaction is open.
 *    That is time on the wire: what a pool adds before and after is not in it.
 */
export class WireCounter {
  roundTrips = 0;
  heldMs = 0;
  private readonly links = new Set<Link>();

  private constructor(
    /** The database's URL, through the proxy. */
    readonly url: string,
    private readonly server: ReturnType<typeof createServer>,
  ) {}

  static async start(databaseUrl: string): Promise<WireCounter> {
    const target = new URL(databaseUrl);
    const server = createServer((client) => {
      const upstream = connect({ host: target.hostname, port: Number(target.port || 5432), noDelay: true });
      const link = new Link(counter, client.setNoDelay(true), upstream);
      counter.links.add(link);
      client.once('close', () => counter.links.delete(link));
    });
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    const url = new URL(databaseUrl);
    url.host = `127.0.0.1:${(server.address() as AddressInfo).port}`;
    const counter = new WireCounter(url.href, server);
    return counter;
  }

  /** Resolves when no connection is held any more: some commit after the response. */
  async idle(): Promise<void> {
    do await sleep(5);
    while ([...this.links].some(({ isHeld }) => isHeld));
  }

  reset(): void {
    this.roundTrips = 0;
    this.heldMs = 0;
  }

  async close(): Promise<void> {
    const closed = once(this.server.close(), 'close');
    for (const link of this.links) link.cut();
    await closed;
  }
}

class Link {
  private isStarted = false;
  /** Query and Sync messages without a ReadyForQuery yet. */
  private due = 0;
  /** The types of message one of which ends the answer to a Flush. */
  private dueAfterFlush = '';
  /** Between the first message of a group and the Sync or Flush that sends it off. */
  private isInGroup = false;
  private lastType = '';
  private heldSince: number | undefined;

  constructor(
    private readonly counter: WireCounter,
    private readonly client: Socket,
    private readonly upstream: Socket,
  ) {
    const frontend = new MessageReader('frontend', 0);
    const backend = new MessageReader('backend', 0);
    client.on('data', (bytes) => {
      for (const { type } of frontend.read(bytes)) {
        if (type === 'SSLRequest' || type === 'GSSENCRequest') throw new Error('The proxy of the benchmark speaks no TLS.');
        if (this.isStarted) this.sent(type);
      }
      upstream.write(bytes);
    });
    upstream.on('data', (bytes) => {
      for (const { type, text } of backend.read(bytes)) this.received(type, text);
      client.write(bytes);
    });
    for (const socket of [client, upstream]) socket.on('error', () => {}).once('close', () => this.cut());
  }

  get isHeld(): boolean {
    return this.heldSince !== undefined;
  }

  cut(): void {
    this.client.destroy();
    this.upstream.destroy();
  }

  private sent(type: string): void {
    if (type === 'X') return;
    if (this.due === 0 && !this.dueAfterFlush && !this.isInGroup) this.counter.roundTrips++;
    this.heldSince ??= performance.now();
    if (type === 'H') this.dueAfterFlush = answers[this.lastType] ?? '';
    else if (type === 'Q' || type === 'S') this.due++;
    this.isInGroup = type !== 'H' && type !== 'Q' && type !== 'S';
    this.lastType = type;
  }

  private received(type: string, text: string): void {
    if (this.dueAfterFlush.includes(type) || type === 'E') this.dueAfterFlush = '';
    if (type !== 'Z') return;
    if (!this.isStarted) {
      this.isStarted = true;
      return;
    }
    this.due--;
    if (this.due > 0 || this.isInGroup || text !== 'I' || this.heldSince === undefined) return;
    this.counter.heldMs += performance.now() - this.heldSince;
    this.heldSince = undefined;
  }
}
