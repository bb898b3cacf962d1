import { once } from 'node:events';
import {
  Agent,
  type AgentOptions,
  createServer,
  type IncomingHttpHeaders,
  request as nodeRequest,
  type OutgoingHttpHeaders,
  type RequestListener,
  type Server,
} from 'node:http';
import { type AddressInfo, connect, type Socket } from 'node:net';

export interface Listening {
  port: number;
  url: string;
  server: Server;
  /** Stops listening and destroys what is still open. */
  close(): Promise<void>;
}

export async function listen(app: RequestListener): Promise<Listening> {
  const server = createServer(app);
  const sockets = new Set<Socket>();
  server.on('connection', (socket) => {
    sockets.add(socket);
    socket.once('close', () => sockets.delete(socket));
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  return {
    port,
    url: `http://127.0.0.1:${port}`,
    server,
    async close() {
      const closed = new Promise((resolve) => server.close(resolve));
      for (const socket of sockets) socket.destroy();
      await closed;
    },
  };
}

export interface RequestOptions {
  method?: string;
  headers?: OutgoingHttpHeaders;
  /** Sent as it is; an object as JSON. */
  body?: string | Buffer | object;
  agent?: Agent;
  /** Ends the request early; the answer then has an `error`. */
  signal?: AbortSignal;
}

export interface Answer {
  /** 0 if the connection ended before a head came. */
  status: number;
  headers: IncomingHttpHeaders;
  rawHeaders: string[];
  body: string;
  /** Whether the response came to its proper end: a client may take it for whole. */
  complete: boolean;
  error?: NodeJS.ErrnoException;
}

/** Never rejects: a response that is cut off, or never comes, is an answer with `complete: false` and an `error`. */
export function request(url: string, options: RequestOptions = {}): Promise<Answer> {
  const { method = 'GET', headers = {}, body, agent, signal } = options;
  const isJson = typeof body === 'object' && !Buffer.isBuffer(body);
  const payload = isJson ? JSON.stringify(body) : body;
  return new Promise((resolve) => {
    const answer: Answer = { status: 0, headers: {}, rawHeaders: [], body: '', complete: false };
    const outgoing = nodeRequest(url, {
      method,
      // A connection of its own unless the test brings an agent: no keep-alive between requests.
      agent: agent ?? false,
      headers: { ...(isJson && { 'Content-Type': 'application/json' }), ...headers },
      ...(signal && { signal }),
    });
    outgoing.on('error', (error) => {
      answer.error ??= error;
    });
    outgoing.on('response', (response) => {
      Object.assign(answer, { status: response.statusCode ?? 0, headers: response.headers, rawHeaders: response.rawHeaders });
      response.setEncoding('utf8');
      response.on('data', (chunk: string) => {
        answer.body += chunk;
      });
      response.on('error', (error) => {
        answer.error ??= error;
      });
      response.on('close', () => {
        answer.complete = response.complete;
      });
    });
    outgoing.on('close', () => resolve(answer));
    outgoing.end(payload);
  });
}

export function get(url: string, options: RequestOptions = {}): Promise<Answer> {
  return request(url, { ...options, method: 'GET' });
}

export function post(url: string, body?: RequestOptions['body'], options: RequestOptions = {}): Promise<Answer> {
  return request(url, { ...options, method: 'POST', ...(body !== undefined && { body }) });
}

/** One connection that is used again and again, to see what a response leaves behind on it. */
export function keepAliveAgent(options: AgentOptions = {}): Agent {
  return new Agent({ keepAlive: true, maxSockets: 1, ...options });
}

/** Sends these bytes and gives all that comes back until the server closes the connection. */
export async function rawRequest(port: number, bytes: string | Buffer): Promise<string> {
  const client = await RawClient.connect(port);
  client.write(bytes);
  await client.closed;
  return client.received;
}

/** A socket under the test's full control: half requests, pipelining, resets, reading slowly. */
export class RawClient {
  static async connect(port: number): Promise<RawClient> {
    const socket = connect({ port, host: '127.0.0.1' });
    await once(socket, 'connect');
    return new RawClient(socket);
  }

  /** All bytes so far, one character each. */
  received = '';
  /** Settles when the connection is gone, with the error that ended it, such as ECONNRESET after the server's RST. */
  readonly closed: Promise<NodeJS.ErrnoException | undefined>;

  private constructor(readonly socket: Socket) {
    let failure: NodeJS.ErrnoException | undefined;
    socket.setEncoding('latin1');
    socket.on('data', (chunk: string) => {
      this.received += chunk;
    });
    socket.on('error', (error) => {
      failure = error;
    });
    this.closed = new Promise((resolve) => socket.once('close', () => resolve(failure)));
  }

  write(bytes: string | Buffer): this {
    this.socket.write(bytes);
    return this;
  }

  /** Sends a request without a body, unless `head` brings one. */
  get(path: string, ...headers: string[]): this {
    return this.write([`GET ${path} HTTP/1.1`, 'Host: localhost', ...headers, '', ''].join('\r\n'));
  }

  /** Waits until what was received so far contains this text or fulfils this condition. Rejects if the connection ends first. */
  async readUntil(wanted: string | ((received: string) => boolean)): Promise<string> {
    const isThere = () => (typeof wanted === 'string' ? this.received.includes(wanted) : wanted(this.received));
    const ended = this.closed.then((error) => error ?? new Error('closed'));
    while (!isThere()) {
      const end = await Promise.race([
        ended,
        once(this.socket, 'data').then(
          () => undefined,
          (error: Error) => error,
        ),
      ]);
      if (end && !isThere())
        throw new Error(`The connection ended before ${String(wanted)}: ${JSON.stringify(this.received)}`, { cause: end });
    }
    return this.received;
  }

  /** Stops reading, so that the server's writes pile up. */
  pause(): this {
    this.socket.pause();
    return this;
  }

  resume(): this {
    this.socket.resume();
    return this;
  }

  /** Half-closes, as a client that has nothing more to say. */
  end(): Promise<unknown> {
    this.socket.end();
    return this.closed;
  }

  /** Disconnects with FIN. */
  destroy(): Promise<unknown> {
    this.socket.destroy();
    return this.closed;
  }

  /** Disconnects with RST. */
  reset(): Promise<unknown> {
    this.socket.resetAndDestroy();
    return this.closed;
  }
}
