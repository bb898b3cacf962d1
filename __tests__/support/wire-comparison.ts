import { once } from 'node:events';
import type { NextFunction, Request, Response } from 'express';
import type { AppOptions, GatedApps, Handler } from './gated-app';
import { RawClient } from './http';

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
  /** Whether the server closes the connection by itself: nothing can follow. */
  isLast?: boolean;
}

export const GET = 'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n';
const LAST = 'GET /end HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n';

/** The handler in a plain Express app. */
export async function plainExchange(apps: GatedApps, handler: ObservedHandler, options: ComparisonOptions = {}): Promise<Exchange> {
  const { request, isLast, beforeCommit: _, endsWith: __, ...appOptions } = options;
  const observed = observe(handler);
  const { port } = await apps.plain(observed.handler, appOptions);
  return observed.result(await send(port, request, isLast));
}

/** The handler behind the gate; while COMMIT waits at the server's door, not one byte has left. */
export async function gatedExchange(apps: GatedApps, handler: ObservedHandler, options: ComparisonOptions = {}): Promise<Exchange> {
  const { request, isLast, beforeCommit = '', endsWith, ...appOptions } = options;
  const observed = observe(handler);
  const { port, sockets } = await apps.gated(observed.handler, appOptions);
  const hold = apps.hold(endsWith);
  const client = await send(port, request, isLast);
  const wasHeld = await Promise.race([hold.reached.then(() => true), client.closed.then(() => false)]);
  // What the server's socket has been given, whether it has arrived or not.
  const givenTooEarly = sockets.map((socket) => socket.bytesWritten - beforeCommit.length);
  hold.release();
  const exchange = await observed.result(client);
  expect(exchange.bytes.slice(0, beforeCommit.length)).toBe(beforeCommit);
  expect({ wasHeld, givenTooEarly }).toEqual({ wasHeld: true, givenTooEarly: [0] });
  return exchange;
}

/** Runs the handler in a plain app and behind the gate, and expects the same bytes and the same notes. */
export async function expectSameAsPlain(apps: GatedApps, handler: ObservedHandler, options: ComparisonOptions = {}): Promise<Exchange> {
  const plain = await plainExchange(apps, handler, options);
  const gated = await gatedExchange(apps, handler, options);
  expect(gated).toEqual(plain);
  return gated;
}

async function send(port: number, request = GET, isLast = false): Promise<RawClient> {
  const client = await RawClient.connect(port);
  return client.write(isLast ? request : request + LAST);
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

/** Handlers by name, some with options. */
export type Cases = Record<string, ObservedHandler | [ObservedHandler, ComparisonOptions]>;

/** For `it.each`. */
export function listed(cases: Cases): [name: string, handler: ObservedHandler, options: ComparisonOptions][] {
  return Object.entries(cases).map(([name, given]) => (Array.isArray(given) ? [name, ...given] : [name, given, {}]));
}

/** Inserts an entry, then answers. */
export function inserting(answer: ObservedHandler, name = 'entry'): ObservedHandler {
  return async (req, res, note, next) => {
    await req.session('entries').insert({ name });
    return answer(req, res, note, next);
  };
}

/** The head of a request without a body. */
export function requestFor(method: string, ...headers: string[]): string {
  return [`${method} / HTTP/1.1`, 'Host: localhost', ...headers, '', ''].join('\r\n');
}
