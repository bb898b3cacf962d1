import { once } from 'node:events';
import { type ClientHttp2Session, connect, createServer, type Http2ServerRequest, type Http2ServerResponse } from 'node:http2';
import type { AddressInfo } from 'node:net';

export interface Http2Answer {
  /** 0 if no head came. */
  status: number;
  headers: Record<string, unknown>;
  body: string;
  /** Whether the stream came to its proper end. */
  complete: boolean;
  /** With which the stream was reset. */
  code: number;
}

export interface Http2Stream {
  /** Bytes of the body so far. */
  received(): string;
  head: Promise<unknown>;
  answer: Promise<Http2Answer>;
  /** The client gives it up: RST_STREAM, CANCEL. */
  reset(): void;
}

/** One HTTP/2 connection to a server of its own, without TLS. */
export class Http2Connection {
  static async open(listener: (req: Http2ServerRequest, res: Http2ServerResponse) => void): Promise<Http2Connection> {
    const server = createServer(listener).listen(0, '127.0.0.1');
    await once(server, 'listening');
    const client = connect(`http://127.0.0.1:${(server.address() as AddressInfo).port}`);
    await once(client, 'connect');
    return new Http2Connection(client, async () => {
      client.destroy();
      await new Promise((resolve) => server.close(resolve));
    });
  }

  /** Set when the connection itself ends. */
  isClosed = false;

  private constructor(
    private readonly client: ClientHttp2Session,
    readonly close: () => Promise<void>,
  ) {
    // Of the connection; each of its streams has an error of its own.
    client.on('error', () => {});
    client.once('close', () => {
      this.isClosed = true;
    });
  }

  /** Never rejects, as `get` of HTTP/1. */
  get(path: string): Promise<Http2Answer> {
    return this.start(path).answer;
  }

  start(path: string, method = 'GET'): Http2Stream {
    const stream = this.client.request({ ':path': path, ':method': method });
    const answer: Http2Answer = { status: 0, headers: {}, body: '', complete: false, code: 0 };
    stream.setEncoding('utf8');
    stream.on('response', (headers) => {
      answer.status = Number(headers[':status']);
      answer.headers = headers;
    });
    stream.on('data', (chunk: string) => {
      answer.body += chunk;
    });
    stream.on('end', () => {
      answer.complete = true;
    });
    stream.on('error', () => {});
    stream.end();
    const closed = new Promise<Http2Answer>((resolve) =>
      stream.once('close', () => {
        answer.code = stream.rstCode;
        answer.complete &&= answer.code === 0 && answer.status > 0;
        resolve(answer);
      }),
    );
    return {
      received: () => answer.body,
      head: Promise.race([once(stream, 'response').catch(() => {}), closed]),
      answer: closed,
      reset: () => stream.close(8),
    };
  }
}
