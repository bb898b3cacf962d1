import { connect, type Socket } from 'node:net';

export interface LoadFigures {
  seconds: number;
  /** All that were answered. */
  answered: number;
  /** How many got each status; 0 is a connection that broke. */
  statuses: Record<number, number>;
  /** In ms, in the order of the answers. */
  latencies: number[];
}

export interface LoadOptions {
  port: number;
  connections: number;
  /** Requests that all clients send together, each in its turn. Without it, each sends its next one as soon as it has an answer. */
  perSecond?: number | undefined;
  /** The request's first words, such as `GET /accounts/7`. */
  requestOf: (n: number) => string;
  onAnswer?: (n: number, status: number) => void;
}

/**
 * Clients that go on for as long as they are let, each on a connection of its own. They write and read plain bytes: Node's own client costs more than the server that it would measure, and the cores are shared.
 */
export class SteadyLoad {
  private readonly clients: SteadyClient[] = [];
  /** Those that have their answer, where there is a rate. */
  private readonly idle: SteadyClient[] = [];
  private pacemaker: NodeJS.Timeout | undefined;
  private count = 0;
  private isStopping = false;
  private since = performance.now();
  private figures = noFigures();

  private constructor(private readonly options: LoadOptions) {}

  static begin(options: LoadOptions): SteadyLoad {
    const load = new SteadyLoad(options);
    for (let i = 0; i < options.connections; i++) load.add().catch(() => {});
    return load;
  }

  /** Resolves when each client has had its first answer. */
  static async start(options: LoadOptions): Promise<SteadyLoad> {
    const load = new SteadyLoad(options);
    const first: Promise<void>[] = [];
    for (let i = 1; i <= options.connections; i++) {
      first.push(load.add());
      // Not thousands in one tick: the server's backlog of connections has an end.
      if (i % 100 === 0) await load.clients.at(-1)?.connected;
    }
    await Promise.all(first);
    load.take();
    if (options.perSecond !== undefined) load.pace(options.perSecond);
    return load;
  }

  private pace(perSecond: number): void {
    const began = performance.now();
    let due = 0;
    this.pacemaker = setInterval(() => {
      const dueNow = Math.floor(((performance.now() - began) * perSecond) / 1_000);
      // What nobody was there to send is not made up for: a burst would be another load.
      for (let missing = dueNow - due; missing > 0 && this.idle.length > 0; missing--) this.idle.shift()?.send();
      due = dueNow;
    }, 1);
  }

  private proceed(client: SteadyClient): void {
    if (this.options.perSecond === undefined || this.isStopping) client.send();
    else this.idle.push(client);
  }

  /** What has come since the last time. */
  take(): LoadFigures {
    const now = performance.now();
    const figures = { ...this.figures, seconds: (now - this.since) / 1_000 };
    this.since = now;
    this.figures = noFigures();
    return figures;
  }

  /** Resolves when each client has the answer that it waits for, or after `ms`; then cuts the connections. */
  async stop(ms = 10_000): Promise<void> {
    this.isStopping = true;
    clearInterval(this.pacemaker);
    for (const client of this.idle.splice(0)) client.send();
    const deadline = new AbortController();
    await Promise.race([
      Promise.all(this.clients.map((client) => client.ended)),
      new Promise((resolve) => {
        const timer = setTimeout(resolve, ms);
        deadline.signal.addEventListener('abort', () => clearTimeout(timer));
      }),
    ]);
    deadline.abort();
    for (const client of this.clients) client.cut();
  }

  private add(): Promise<void> {
    const client = new SteadyClient(
      this.options.port,
      () => this.next(),
      (n, status, ms) => this.note(n, status, ms),
      (idle) => this.proceed(idle),
    );
    this.clients.push(client);
    return client.start();
  }

  private next(): { n: number; head: string } | undefined {
    if (this.isStopping) return undefined;
    const n = this.count++;
    const request = this.options.requestOf(n);
    const length = request.startsWith('GET') ? '' : 'Content-Length: 0\r\n';
    return { n, head: `${request} HTTP/1.1\r\nHost: localhost\r\n${length}\r\n` };
  }

  private note(n: number, status: number, ms: number): void {
    this.figures.answered++;
    this.figures.statuses[status] = (this.figures.statuses[status] ?? 0) + 1;
    this.figures.latencies.push(ms);
    this.options.onAnswer?.(n, status);
  }
}

function noFigures(): Omit<LoadFigures, 'seconds'> {
  return { answered: 0, statuses: {}, latencies: [] };
}

class SteadyClient {
  /** When it sends nothing any more. */
  readonly ended: Promise<void>;
  readonly connected: Promise<void>;
  private end!: () => void;
  private noteConnected!: () => void;
  private firstAnswer!: { resolve: () => void; reject: (error: Error) => void };
  private socket!: Socket;
  private current: { n: number; since: number } | undefined;
  private text = '';
  private isCut = false;

  constructor(
    private readonly port: number,
    private readonly next: () => { n: number; head: string } | undefined,
    private readonly note: (n: number, status: number, ms: number) => void,
    private readonly proceed: (client: SteadyClient) => void,
  ) {
    this.ended = new Promise((resolve) => {
      this.end = resolve;
    });
    this.connected = new Promise((resolve) => {
      this.noteConnected = resolve;
    });
  }

  start(): Promise<void> {
    return new Promise((resolve, reject) => {
      this.firstAnswer = { resolve, reject };
      this.connect();
    });
  }

  cut(): void {
    this.isCut = true;
    this.socket.destroy();
  }

  private connect(): void {
    this.text = '';
    const socket = connect({ port: this.port, host: '127.0.0.1', noDelay: true });
    this.socket = socket;
    socket.once('connect', () => {
      this.noteConnected();
      this.send();
    });
    socket.on('data', (bytes) => this.receive(bytes));
    socket.on('error', (error: NodeJS.ErrnoException) => {
      if (error.code !== 'EMFILE') return;
      this.firstAnswer.reject(error);
      this.noteConnected();
    });
    socket.once('close', () => {
      if (this.isCut) return;
      if (this.current) this.answered(0);
      this.connect();
    });
  }

  send(): void {
    const request = this.next();
    if (!request) {
      this.end();
      this.cut();
      return;
    }
    this.current = { n: request.n, since: performance.now() };
    this.socket.write(request.head);
  }

  private receive(bytes: Buffer): void {
    this.text += bytes.toString('latin1');
    const head = this.text.indexOf('\r\n\r\n');
    if (head < 0) return;
    const length = /content-length: (\d+)/i.exec(this.text.slice(0, head))?.[1];
    if (length === undefined) throw new Error('The clients of the benchmark understand answers with a Content-Length only.');
    if (this.text.length < head + 4 + Number(length)) return;
    const status = Number(this.text.slice(9, 12));
    const closes = /\r\nconnection: close/i.test(this.text.slice(0, head));
    this.text = '';
    this.answered(status);
    if (!closes) this.proceed(this);
  }

  private answered(status: number): void {
    const { n, since } = this.current as { n: number; since: number };
    this.current = undefined;
    this.note(n, status, performance.now() - since);
    this.firstAnswer.resolve();
  }
}

/** @param share of the values that are at most as large: 0.99 */
export function percentile(values: readonly number[], share: number): number | undefined {
  const sorted = Float64Array.from(values).sort();
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)];
}
