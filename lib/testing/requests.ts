import { AsyncLocalStorage } from 'node:async_hooks';
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import type { IncomingMessage, ServerResponse } from 'node:http';

/** A request to a server of this process, and the test that it belongs to. */
export interface TestRequest {
  readonly test: object;
  /** Method and path. */
  readonly name: string;
  readonly isRunning: boolean;
}

const storage = new AsyncLocalStorage<TestRequest>();

/** The request that the running code works for; undefined in the test itself. */
export function currentRequest(): TestRequest | undefined {
  return storage.getStore();
}

/** Knows the requests of a test, to name them: by Node's own channel, so that no server has to be prepared for it. */
export class Requests {
  private readonly requests = new Set<TestRequest>();

  constructor(private readonly test: object) {
    subscribe('http.server.request.start', this.onStart);
  }

  stop(): void {
    unsubscribe('http.server.request.start', this.onStart);
  }

  /** Those that have not been answered. */
  get running(): TestRequest[] {
    return [...this.requests].filter(({ isRunning }) => isRunning);
  }

  private readonly onStart = (message: unknown): void => {
    const { request, response } = message as { request: IncomingMessage; response: ServerResponse };
    const { test } = this;
    const known: TestRequest = {
      test,
      name: `${request.method} ${request.url?.replace(/\?.*/, '')}`,
      get isRunning() {
        return !response.writableEnded && !response.destroyed && !request.socket.destroyed;
      },
    };
    this.requests.add(known);
    response.once('close', () => this.requests.delete(known));
    // For what follows of this request, and for nothing else.
    storage.enterWith(known);
  };
}
