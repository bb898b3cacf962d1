import type { IncomingMessage, ServerResponse } from 'node:http';
import type { Socket } from 'node:net';
import { replaceSocket } from './disconnect';

type Method = (...args: any[]) => any;

/** Puts methods on an object and takes them off again, with all that others have put there in the meantime. */
export class Overrides<T extends object> {
  /** What was there before, in the order of its replacement: names and methods in turn. */
  private readonly before: (string | Method)[] = [];
  private names: readonly string[] = [];

  constructor(private readonly target: T) {}

  /** @returns the method that was there */
  set(name: string, method: Method): Method {
    const target = this.target as Record<string, Method>;
    const value = target[name] as Method;
    this.before.push(name, value);
    target[name] = method;
    return value;
  }

  /** Notes what is there now, to bring it back. */
  remember(names: readonly string[]): void {
    const target = this.target as Record<string, Method>;
    this.names = names;
    for (const name of names) if (Object.hasOwn(target, name)) this.before.push(name, target[name] as Method);
  }

  /** Also where someone has wrapped ours since: their memory of the response would outlive it. */
  remove(): void {
    const target = this.target as Record<string, Method>;
    for (const name of this.names) delete target[name];
    for (let i = this.before.length - 2; i >= 0; i -= 2) target[this.before[i] as string] = this.before[i + 1] as Method;
  }
}

/** Kept as long as the connection: to put the method on and off for each of its responses costs more. */
interface SocketHold {
  /** Responses that hold it now. */
  count: number;
  isDestroyRequested: boolean;
  /** Set when the connection is cut: nothing is put off any more. */
  isOver: boolean;
}

const socketHolds = new WeakMap<Socket, SocketHold>();

/**
 * Puts off a `socket.destroy()` without an error: Express's default error handler calls it when a handler throws after its
 * response, and the client of a plain app has received that response by then.
 *
 * @returns a function that lets go, and destroys the socket if that was asked for
 */
export function holdDestroy(socket: Socket): () => void {
  const hold = socketHolds.get(socket) ?? watchDestroy(socket);
  hold.count++;
  let isLetGo = false;
  return () => {
    if (isLetGo) return;
    isLetGo = true;
    hold.count--;
    if (hold.count === 0 && hold.isDestroyRequested) socket.destroy();
  };
}

function watchDestroy(socket: Socket): SocketHold {
  const hold: SocketHold = { count: 0, isDestroyRequested: false, isOver: false };
  const { destroy } = socket;
  socket.destroy = (error?: Error): Socket => {
    // A client that can receive nothing any more, and a server that shuts down, wait for nobody.
    const { server } = socket as { server?: { listening: boolean } };
    if (hold.count === 0 || hold.isOver || error || !socket.writable || server?.listening === false) return destroy.call(socket, error);
    hold.isDestroyRequested = true;
    return socket;
  };
  socketHolds.set(socket, hold);
  return hold;
}

/**
 * Wakes the writers whose `write` was held, and so was answered with `false`.
 *
 * Where compression is mounted before us, it hands listeners for `drain` to a stream of its own, which knows nothing of the writes
 * that wait here: they are kept from it until there is something that it can drain.
 */
export class HeldDrain {
  private isReleased = false;
  private readonly kept: [method: 'on' | 'addListener' | 'once', listener: () => void][] = [];

  constructor(private readonly res: ServerResponse) {
    if (!Object.hasOwn(res, 'on')) return;
    for (const method of ['on', 'addListener', 'once'] as const) {
      const original = res[method];
      res[method] = (event: string | symbol, listener: (...args: any[]) => void): typeof res => {
        if (this.isReleased || event !== 'drain') return original.call(res, event, listener);
        this.kept.push([method, listener]);
        return res;
      };
    }
  }

  /** Before the writes are made: they will call for the listeners. */
  release(): void {
    this.isReleased = true;
    for (const [method, listener] of this.kept) this.res[method]('drain', listener);
  }

  /** After the writes were made, if Node has taken all at once and will not call. */
  wake(): void {
    for (const [, listener] of this.kept) listener.call(this.res);
    this.res.emit('drain');
  }
}

/**
 * Once an error has been answered, a late one of the same handler (after a time limit, or of a `pipeline()`) must not end the connection:
 * Express's final handler destroys `req.socket` then, and the next request may be under way on it.
 */
export function spareConnection(req: IncomingMessage, res: ServerResponse): void {
  const { socket } = req;
  if (!socket) return;
  const destroy = (error?: Error): Socket => {
    // `req.destroy()` is meant: it ends an upload.
    if (error || req.aborted) socket.destroy(error);
    return spared;
  };
  const spared: Socket = Object.create(socket, { destroy: { value: destroy } });
  // Not only when it is finished: a pipelined one has no connection yet, which belongs to those before it.
  replaceSocket(req, spared, () => res.writableEnded || res.socket === null);
}

const CUT = 'The response was cut off: its transaction could not be committed.';

/** Ends a connection so that no client can take the end for the response's: HTTP/1.0 takes a FIN for completion. */
export function cutConnection(res: ServerResponse): void {
  const socket = res.socket as (Socket & { encrypted?: boolean; _parent?: Socket }) | null;
  const hold = socket && socketHolds.get(socket);
  if (hold) hold.isOver = true;
  // Beneath TLS there is a connection that can be reset; not in what an adapter passes for a socket.
  const connection = socket?.encrypted ? socket._parent : socket;
  if (connection && 'resetAndDestroy' in connection) connection.resetAndDestroy();
  else {
    // A pipelined response has its turn when those before it have arrived.
    if (!socket) res.once('socket', () => cutConnection(res));
    res.destroy();
    // In an adapter (serverless-http) nothing else tells: its caller would wait for ever.
    if (socket && typeof socket.once !== 'function' && res.listenerCount('error') > 0) res.emit('error', new Error(CUT));
  }
}
