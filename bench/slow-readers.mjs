/*
 * Clients that read slowly, in a process of their own: they take a little of the response and let the rest wait at the server.
 * Arguments: the server's socket, how many clients, bytes per second, path.
 */
import { connect } from 'node:net';

const [socketPath = '', clients = '0', bytesPerSecond = '0', path = '/'] = process.argv.slice(2);
const TICKS_PER_SECOND = 10;
const chunk = Number(bytesPerSecond) / TICKS_PER_SECOND;

/** @type {{ socket: import('node:net').Socket, bytes: number, isClosed: boolean }[]} */
const readers = [];

function start() {
  for (let i = 0; i < Number(clients); i++) {
    const reader = {
      bytes: 0,
      isClosed: false,
      socket: connect({
        path: socketPath,
        onread: {
          buffer: Buffer.alloc(chunk),
          // Stops the socket: no more is read than fits in.
          callback(read) {
            reader.bytes += read;
            return false;
          },
        },
      }),
    };
    readers.push(reader);
    reader.socket.on('error', () => {});
    reader.socket.once('close', () => {
      reader.isClosed = true;
    });
    reader.socket.write(`GET ${path}/${i} HTTP/1.1\r\nHost: localhost\r\n\r\n`);
  }
  setInterval(() => {
    for (const { socket } of readers) socket.resume();
  }, 1_000 / TICKS_PER_SECOND);
}

process.on('message', (/** @type {string} */ question) => {
  if (question === 'start') {
    start();
    process.send?.('started');
  } else if (question === 'bytes') {
    process.send?.(readers.map(({ bytes, isClosed }) => ({ bytes, isClosed })));
  } else process.exit();
});
