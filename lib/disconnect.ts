import type { IncomingMessage, ServerResponse } from 'node:http';
import type { Socket } from 'node:net';

const watched = new WeakMap<Socket, Set<() => void>>();
/** The connections of requests that have something else in the place of their socket. */
const connections = new WeakMap<Socket, Socket>();

/** As long as it says so, the request has this in the place of its socket. */
export function replaceSocket(req: IncomingMessage, substitute: Socket, isInPlace: () => boolean): void {
  const { socket } = req;
  connections.set(substitute, connectionOf(socket));
  Object.defineProperty(req, 'socket', { configurable: true, get: () => (isInPlace() ? substitute : socket) });
}

function connectionOf(socket: Socket): Socket {
  return connections.get(socket) ?? socket;
}

/** Whether nobody can receive the response any more. */
export function isGone(req: IncomingMessage, res: ServerResponse): boolean {
  return res.destroyed || req.socket?.destroyed === true;
}

/**
 * Calls back when the client has gone, or when the response is complete.
 *
 * 1. The request's `close` says nothing: it comes as soon as the body has been read.
 * 2. A response that waits behind another one on its connection (pipelining) never has a `close`: the socket is watched too,
 *    by one listener for all its requests.
 *
 * @returns a function that calls it off
 */
export function onClose(req: IncomingMessage, res: ServerResponse, listener: () => void): () => void {
  // One that stands in its place is made for each request, and would leave a listener of its own on the connection.
  const socket = connectionOf(req.socket);
  // An adapter (serverless-http) has something in its place that emits nothing.
  const listeners = typeof socket?.once === 'function' ? listenersOf(socket) : undefined;
  const stop = (): void => {
    res.removeListener('close', notify);
    listeners?.delete(notify);
  };
  const notify = (): void => {
    stop();
    listener();
  };
  res.on('close', notify);
  listeners?.add(notify);
  return stop;
}

function listenersOf(socket: Socket): Set<() => void> {
  let listeners = watched.get(socket);
  if (listeners === undefined) {
    const created = new Set<() => void>();
    socket.once('close', () => {
      for (const listener of created) listener();
    });
    watched.set(socket, created);
    listeners = created;
  }
  return listeners;
}
