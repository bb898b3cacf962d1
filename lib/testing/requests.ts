import { AsyncLocalStorage } from 'node:async_hooks';
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import type { IncomingMessage, ServerResponse } from 'node:http';

/** A request to a server of this process, and the test that it belongs to. */
export interface TestRequest<Test = unknown> {
  readonly test: Test;
  /** Method and path. */
  readonly name: string;
  readonly isRunning: boolean;
}

/** Knows the requests of tests, to name them: by Node's own channel, so that no server has to be prepared for it. */
export class Requests<Test> {
  private readonly storage = new AsyncLocalStorage<TestRequest<Test>>();
  private requests: TestRequest<Test>[] = [];

  /** @param currentTest the one that a request belongs to which comes now */
  constructor(private readonly currentTest: () => Test) {}

  start(): void {
    subscribe('http.server.request.start', this.onStart);
  }

  stop(): void {
    unsubscribe('http.server.request.start', this.onStart);
  }

  /** The request that the running code works for; undefined in the test itself. */
  get current(): TestRequest<Test> | undefined {
    return this.storage.getStore();
  }

  /** Those of a test that have not been answered. */
  runningIn(test: Test): TestRequest<Test>[] {
    return this.running.filter((request) => request.test === test);
  }

  private get running(): TestRequest<Test>[] {
    return this.requests.filter(({ isRunning }) => isRunning);
  }

  private readonly onStart = (message: unknown): void => {
    const { request, response } = message as { request: IncomingMessage; response: ServerResponse };
    const known: TestRequest<Test> = {
      test: this.currentTest(),
      name: `${request.method} ${request.url?.replace(/\?.*/, '')}`,
      get isRunning() {
        return !response.writableEnded && !response.destroyed && !request.socket.destroyed;
      },
    };
    this.requests = [...this.running, known];
    // For what follows of this request, and for nothing else.
    this.storage.enterWith(known);
  };
}
