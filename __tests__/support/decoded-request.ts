import { type IncomingMessage, type RequestOptions, request } from 'node:http';
import type { Duplex } from 'node:stream';
import { constants, createBrotliDecompress, createGunzip, createInflate } from 'node:zlib';

export interface DecodedAnswer {
  status: number;
  headers: Record<string, unknown>;
  /** What a browser would show: unpacked. */
  body: string;
  complete: boolean;
  error?: string;
}

/** Asks for a compressed response and unpacks it, however far it came. */
export async function getDecoded(url: string, options: RequestOptions = {}): Promise<DecodedAnswer> {
  const response = await openDecoded(url, options).catch((error: NodeJS.ErrnoException) => error);
  if (response instanceof Error || !('text' in response))
    return { status: 0, headers: {}, body: '', complete: false, error: String(response) };
  await response.closed;
  const { statusCode: status = 0, headers, complete } = response.message;
  const { date: _, ...others } = headers;
  return { status, headers: others, body: response.text(), complete };
}

export interface DecodedResponse {
  message: IncomingMessage;
  /** What has been unpacked so far. */
  text(): string;
  closed: Promise<void>;
}

export function openDecoded(url: string, options: RequestOptions = {}): Promise<DecodedResponse> {
  return new Promise((resolve, reject) => {
    const headers = { 'Accept-Encoding': 'gzip', ...options.headers };
    const outgoing = request(url, { agent: false, ...options, headers }, (message) => {
      const unpacked = unpack(message);
      let text = '';
      unpacked.on('data', (chunk: Buffer) => {
        text += chunk.toString();
      });
      const closed = new Promise<void>((settle) => {
        for (const stream of [message, unpacked]) stream.on('error', () => unpacked.destroy());
        message.once('aborted', () => unpacked.destroy());
        unpacked.once('close', () => settle());
      });
      resolve({ message, text: () => text, closed });
    });
    outgoing.on('error', reject).end();
  });
}

function unpack(message: IncomingMessage): IncomingMessage | Duplex {
  // Shows all that has come, without waiting for more.
  const flush = { flush: constants.Z_SYNC_FLUSH, finishFlush: constants.Z_SYNC_FLUSH };
  const encoding = message.headers['content-encoding'];
  if (encoding === 'gzip') return message.pipe(createGunzip(flush));
  if (encoding === 'deflate') return message.pipe(createInflate(flush));
  if (encoding === 'br') return message.pipe(createBrotliDecompress());
  return message;
}
