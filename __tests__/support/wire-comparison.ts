import { once } from 'node:events';
import type { Socket } from 'node:net';
import type { NextFunction, Request, Response } from 'express';
import type { AppOptions, GatedApps, Handler } from './gated-app';
import { type Listening, RawClient } from './http';

/** A handler that writes down what it sees: results, errors, the order of events. */
export type ObservedHandler = (req: Request, res: Response, note: (value: unknown) => void, next: NextFunction) => unknown;

export interface Exchange {
  /** All that came over the wire, without dates. */
  bytes: string;
  notes: unknown[];
}

export interface ComparisonOptions extends AppOptions {
  /** What the client sends; a request for `/end` with `Connection: close` follows, to see what is left on the connection. */
  request?: string;
  /** What may arrive before COMMIT. */
  beforeCommit?: string;
  /** Whether the session ends with a ROLLBACK. */
  endsWith?: 'COMMIT' | 'ROLLBACK';
  /** Says when the handler has done all that it wants to do before COMMIT; by default at once. */
  letGo?: Promise<unknown>;
}

export const GET = 'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n';
const LAST = 'GET /end HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n';

/** The handler in a plain Express app. */
export async function plainExchange(apps: GatedApps, handler: ObservedHandler, options: ComparisonOptions = {}): Promise<Exchange> {
  const observed = observe(handler);
  const listening = await apps.plain(observed.handler, options);
  const client = await RawClient.connect(listening.port);
  client.write((options.request ?? GET) + LAST);
  return observed.result(client);
}

/** The handler behind the gate; while COMMIT waits at the server's door, not one byte has left. */
export async function gatedExchange(apps: GatedApps, handler: ObservedHandler, options: ComparisonOptions = {}): Promise<Exchange> {
  const { request = GET, beforeCommit = '', endsWith, letGo, ...appOptions } = options;
  const observed = observe(handler);
  const listening = await apps.gated(observed.handler, appOptions);
  const sockets = socketsOf(listening);
  const hold = apps.hold(endsWith);
  const client = await RawClient.connect(listening.port);
  client.write(request + LAST);
  await Promise.race([hold.reached, client.closed]);
  await letGo;
  // What the server's socket has been given, whether it has arrived or not.
  expect(sockets.map((socket) => socket.bytesWritten)).toEqual([beforeCommit.length]);
  hold.release();
  const exchange = await observed.result(client);
  expect(exchange.bytes.startsWith(beforeCommit)).toBe(true);
  return exchange;
}

/** Runs the handler in a plain app and behind the gate, and expects the same bytes and the same notes. */
export async function expectSameAsPlain(apps: GatedApps, handler: ObservedHandler, options: ComparisonOptions = {}): Promise<Exchange> {
  const plain = await plainExchange(apps, handler, options);
  const gated = await gatedExchange(apps, handler, options);
  expect(gated).toEqual(plain);
  return gated;
}

export function socketsOf(listening: Listening): Socket[] {
  const sockets: Socket[] = [];
  listening.server.on('connection', (socket) => sockets.push(socket));
  return sockets;
}

/** The result of a call, or the code and message of what it throws. */
export function attempt(call: () => unknown): unknown {
  try {
    const result = call();
    return typeof result === 'object' && result !== null ? 'an object' : result;
  } catch (error) {
    return describeError(error);
  }
}

export function describeError(error: unknown): string {
  const { code, message } = error as NodeJS.ErrnoException;
  return `${code ?? 'error'}: ${message}`;
}

/** What a response says about itself. */
export function stateOf(res: Response): object {
  const { headersSent, writableEnded, statusCode, destroyed } = res;
  return { headersSent, writableEnded, statusCode, destroyed };
}

function observe(handler: ObservedHandler): { handler: Handler; result(client: RawClient): Promise<Exchange> } {
  const notes: unknown[] = [];
  const note = (value: unknown): void => {
    notes.push(value);
  };
  const done: Promise<unknown>[] = [];
  return {
    handler(req, res, next) {
      if (req.url === '/end') {
        res.end('the end');
        return undefined;
      }
      for (const event of ['finish', 'close', 'error']) {
        res.on(event, (error?: Error) => note(error ? `${event} ${describeError(error)}` : event));
      }
      done.push(once(res, 'close').catch(() => {}));
      const result = Promise.resolve(handler(req, res, note, next));
      done.push(result.catch(() => {}));
      return result;
    },
    async result(client) {
      await client.closed;
      await Promise.all(done);
      return { bytes: withoutDates(client.received), notes };
    },
  };
}

export function withoutDates(bytes: string): string {
  return bytes.replace(/^(date|last-modified): .*\r\n/gim, '');
}
