import { once } from 'node:events';
import { connect, type Socket } from 'node:net';

export interface Requests {
  method: string;
  pathOf: (n: number) => string;
}

/**
 * Clients on connections of their own, each with its next request as soon as it has its answer.
 * They write and read plain bytes: Node's own client costs more than the server that is measured, and the cores are shared.
 */
export class Load {
  private constructor(
    private readonly sockets: Socket[],
    private readonly requests: Requests,
  ) {}

  static async open(port: number, connections: number, requests: Requests): Promise<Load> {
    // One that is dropped between two requests is noticed by the next.
    const sockets = Array.from({ length: connections }, () => connect({ port, host: '127.0.0.1', noDelay: true }).on('error', () => {}));
    await Promise.all(sockets.map((socket) => once(socket, 'connect')));
    return new Load(sockets, requests);
  }

  /** Resolves with how long each request took, in ms. */
  async run(count: number): Promise<number[]> {
    const latencies: number[] = [];
    let sent = 0;
    const client = async (socket: Socket): Promise<void> => {
      while (sent < count) {
        const { method, pathOf } = this.requests;
        const request = `${method} ${pathOf(sent++)} HTTP/1.1\r\nHost: localhost\r\n${method === 'GET' ? '' : 'Content-Length: 0\r\n'}\r\n`;
        const start = performance.now();
        await exchange(socket, request);
        latencies.push(performance.now() - start);
      }
    };
    await Promise.all(this.sockets.map(client));
    return latencies;
  }

  close(): void {
    for (const socket of this.sockets) socket.destroy();
  }
}

/** Resolves when the whole response has arrived. */
function exchange(socket: Socket, request: string): Promise<void> {
  return new Promise((resolve, reject) => {
    const response = new ResponseReader();
    const done = (error?: Error) => {
      socket.off('data', onData).off('error', done).off('close', onClose);
      if (error) reject(error);
      else resolve();
    };
    const onClose = () => done(Object.assign(new Error(`No answer came to ${request.split('\r\n', 1)}.`), { code: 'ECONNRESET' }));
    const onData = (bytes: Buffer) => {
      if (!response.read(bytes)) return;
      if (response.status < 300) done();
      else done(new Error(`${request.split('\r\n', 1)} was answered with ${response.status}.`));
    };
    socket.on('data', onData).once('error', done).once('close', onClose);
    if (socket.destroyed) onClose();
    else socket.write(request);
  });
}

class ResponseReader {
  status = 0;
  private head = '';
  /** Bytes of the body that are still to come; undefined for a body in chunks, whose end is known by its last bytes. */
  private left: number | undefined;
  private tail = '';

  /** True when the response is complete. */
  read(bytes: Buffer): boolean {
    let body = bytes;
    if (this.status === 0) {
      const before = this.head.length;
      this.head += bytes.toString('latin1');
      const end = this.head.indexOf('\r\n\r\n');
      if (end < 0) return false;
      const head = this.head.slice(0, end);
      this.status = Number(head.slice(9, 12));
      const length = /^content-length: *(\d+)/im.exec(head)?.[1];
      this.left = length === undefined ? undefined : Number(length);
      body = bytes.subarray(end + 4 - before);
    }
    if (this.left !== undefined) {
      this.left -= body.length;
      return this.left <= 0;
    }
    // The last chunk. No body of the benchmark has a CR of its own.
    this.tail = (this.tail + body.toString('latin1', Math.max(0, body.length - 5))).slice(-5);
    return this.tail === '0\r\n\r\n';
  }
}
