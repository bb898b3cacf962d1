import type { Request, Response } from 'express';

const HEARTBEAT_MS = 15_000;
/** What a watcher may have unread. */
const PATIENCE_BYTES = 1_000_000;

interface Occasions {
  onFirst(): void;
  onLast(): void;
  /** What a watcher is told first. */
  hello(): object;
}

/** Those who have the page open: responses of Server-Sent Events. */
export class Watchers {
  private readonly responses = new Set<Response>();
  private heartbeat: NodeJS.Timeout | undefined;
  private isClosed = false;

  constructor(private readonly occasions: Occasions) {}

  add({ socket }: Request, res: Response): void {
    if (this.isClosed) {
      res.destroy(); // An EventSource asks again after that, and not after a 503.
      return;
    }
    // `close`, or a browser that gets the end of this response asks for the next one on the same connection.
    res.set({ 'Content-Type': 'text/event-stream', 'Cache-Control': 'no-store', Connection: 'close' });
    res.write('retry: 1000\n\n');
    if (this.responses.size === 0) {
      this.heartbeat = setInterval(() => this.write(':\n\n'), HEARTBEAT_MS).unref();
      this.occasions.onFirst();
    }
    res.write(event('hello', this.occasions.hello()));
    this.responses.add(res);
    res.once('close', () => this.remove(res));
    // A response that still waits for the one before it tells of no `close` when its connection is reset.
    socket.once('close', () => this.remove(res));
  }

  tell(name: string, message: object): void {
    this.write(event(name, message));
  }

  /** Ends all of them, so that the server need not wait for them. */
  close(): void {
    this.isClosed = true;
    for (const res of this.responses) res.end();
  }

  private write(text: string): void {
    for (const res of this.responses) {
      if (res.writableLength > PATIENCE_BYTES) res.destroy();
      else if (!res.writableEnded) res.write(text);
    }
  }

  private remove(res: Response): void {
    if (!this.responses.delete(res) || this.responses.size > 0) return;
    clearInterval(this.heartbeat);
    this.occasions.onLast();
  }
}

// JSON has no line breaks of its own, which would end the event.
const event = (name: string, message: object): string => `event: ${name}\ndata: ${JSON.stringify(message)}\n\n`;
