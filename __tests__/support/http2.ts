import { once } from 'node:events';
import { type ClientHttp2Session, connect, createServer, type Http2ServerRequest, type Http2ServerResponse } from 'node:http2';
import type { AddressInfo } from 'node:net';

export interface Http2Answer {
  /** 0 if no head came. */
  status: number;
  body: string;
  /** Whether the stream came to its proper end. */
  complete: boolean;
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

  private constructor(
    private readonly client: ClientHttp2Session,
    readonly close: () => Promise<void>,
  ) {}

  /** Never rejects: a stream that is broken off is an answer that is not complete. */
  get(path: string): Promise<Http2Answer> {
    const stream = this.client.request({ ':path': path });
    const answer: Http2Answer = { status: 0, body: '', complete: false };
    stream.setEncoding('utf8');
    stream.on('response', (headers) => {
      answer.status = Number(headers[':status']);
    });
    stream.on('data', (chunk: string) => {
      answer.body += chunk;
    });
    stream.on('error', () => {});
    return new Promise((resolve) => {
      stream.once('close', () => resolve({ ...answer, complete: answer.status > 0 && stream.rstCode === 0 }));
      stream.end();
    });
  }
}
