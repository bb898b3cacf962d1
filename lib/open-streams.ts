import { performance } from 'node:perf_hooks';
import type { Transform } from 'node:stream';

/** The streams of rows that are being read. */
export class OpenStreams {
  /** True if the driver's stream is piped into it, and so has put a listener for errors on it. */
  private readonly streams = new Map<Transform, boolean>();
  /** When the last row passed, as `performance.now()` tells the time; 0 if none has. */
  movedAt = 0;

  get areOpen(): boolean {
    return this.streams.size > 0;
  }

  /**
   * Follows a stream until it closes.
   *
   * @param run makes the rows flow into it; it is told of the closing, since a stream that is destroyed early never ends the driver's
   */
  async feed(stream: Transform, run: (closed: Promise<void>) => Promise<unknown>): Promise<void> {
    this.streams.set(stream, false);
    this.watch(stream);
    stream.once('pipe', (source: DriverStream) => {
      this.streams.set(stream, true);
      closeOnce(source);
    });
    const closed = new Promise<void>((resolve) => {
      stream.once('close', () => {
        this.streams.delete(stream);
        resolve();
      });
    });
    try {
      await run(closed);
    } catch (error) {
      // Knex passes on the errors of the driver's stream only, and leaves ours open after them.
      if (this.streams.get(stream)) stream.destroy();
      else destroyStream(stream, error as Error);
      throw error;
    }
  }

  private watch(stream: Transform): void {
    const { _transform, read } = stream;
    stream._transform = (row, encoding, callback) => {
      this.movedAt = performance.now();
      _transform.call(stream, row, encoding, callback);
    };
    // The last rows wait in its buffer.
    stream.read = (size) => {
      const row = read.call(stream, size);
      if (row !== null) this.movedAt = performance.now();
      return row;
    };
  }

  destroy(error: Error): void {
    for (const [stream, isFed] of this.streams) destroyStream(stream, error, isFed);
  }
}

/** pg-query-stream. */
interface DriverStream {
  cursor?: { readonly state: string };
  _destroy(error: Error | null, callback: (error?: Error | null) => void): void;
}

/**
 * pg-cursor (2.22) forgets that it was closed when the server's first answer comes after that. It then closes itself again, and the
 * second ReadyForQuery ends the next statement before its time: COMMIT would seem to have no answer.
 */
function closeOnce(source: DriverStream): void {
  const destroy = source._destroy;
  source._destroy = (error, callback) => {
    destroy.call(source, error, callback);
    if (source.cursor?.state === 'done') Object.defineProperty(source.cursor, 'state', { get: () => 'done', set: () => {} });
  };
}

/** Tells a stream's reader why it ends, if there is one: without a listener, the error would end the process. */
export function destroyStream(stream: Transform, error: Error, isFed = false): void {
  stream.destroy(stream.listenerCount('error') > (isFed ? 1 : 0) ? error : undefined);
}
