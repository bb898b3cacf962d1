export interface WireMessage {
  /** Which of the proxy's connections, counted from 1. */
  connection: number;
  side: 'frontend' | 'backend';
  /** The protocol's letter, as `Q` or `P`; `CancelRequest` for what has none. */
  type: string;
  /** From the client: the SQL of Query and Parse. From the server: the command tag, the SQLSTATE of an error, the status of ReadyForQuery. */
  text: string;
  /** As it came, header included. */
  bytes: Buffer;
}

const startUpCodes = new Map([
  [80877102, 'CancelRequest'],
  [80877103, 'SSLRequest'],
  [80877104, 'GSSENCRequest'],
]);

/** Cuts a stream of bytes into PostgreSQL's messages, however TCP split or joined them. */
export class MessageReader {
  private rest: Buffer = Buffer.alloc(0);
  /** A client's first messages have no letter. */
  private isStartUp: boolean;

  constructor(
    private readonly side: 'frontend' | 'backend',
    private readonly connection: number,
  ) {
    this.isStartUp = side === 'frontend';
  }

  read(chunk: Buffer): WireMessage[] {
    this.rest = Buffer.concat([this.rest, chunk]);
    const messages: WireMessage[] = [];
    for (let message = this.next(); message; message = this.next()) messages.push(message);
    return messages;
  }

  private next(): WireMessage | undefined {
    const letterLength = this.isStartUp ? 0 : 1;
    if (this.rest.length < letterLength + 4) return undefined;
    const length = letterLength + this.rest.readInt32BE(letterLength);
    if (this.rest.length < length) return undefined;
    const bytes = this.rest.subarray(0, length);
    this.rest = this.rest.subarray(length);
    const { connection, side } = this;
    if (!this.isStartUp) {
      const type = String.fromCharCode(bytes[0] ?? 0);
      return { connection, side, type, text: this.textOf(type, bytes.subarray(5)), bytes };
    }
    const type = startUpCodes.get(bytes.readInt32BE(4)) ?? 'Startup';
    // After SSLRequest the client begins anew, still without a letter.
    this.isStartUp = type === 'SSLRequest' || type === 'GSSENCRequest';
    return { connection, side, type, text: '', bytes };
  }

  private textOf(type: string, body: Buffer): string {
    if (this.side === 'frontend') {
      if (type === 'Q') return cString(body, 0);
      if (type === 'P') return cString(body, body.indexOf(0) + 1);
      return '';
    }
    if (type === 'C') return cString(body, 0);
    if (type === 'Z') return body.toString('latin1');
    if (type === 'E') return errorField(body, 'C');
    return '';
  }
}

function cString(buffer: Buffer, start: number): string {
  return buffer.toString('utf8', start, buffer.indexOf(0, start));
}

function errorField(body: Buffer, wanted: string): string {
  for (let offset = 0; offset < body.length && body[offset] !== 0; offset = body.indexOf(0, offset) + 1) {
    if (body[offset] === wanted.charCodeAt(0)) return cString(body, offset + 1);
  }
  return '';
}
