import { AsyncLocalStorage } from 'node:async_hooks';
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import type { ClientRequest, IncomingMessage, ServerResponse } from 'node:http';
import { performance } from 'node:perf_hooks';
import { setImmediate as nextTurn } from 'node:timers/promises';

/** What the running code works for: a request to a server of this process, or a test; and the test that it belongs to. */
export interface TestRequest<Test = unknown> {
  readonly test: Test;
  /** Method and path; undefined for the test itself. */
  readonly name: string | undefined;
  /** `'gone'`: its client has given it up. */
  readonly state: 'running' | 'answered' | 'gone';
}

/** Knows the requests of tests, to name them: by Node's own channels, so that no server and no client has to be prepared for it. */
export class Requests<Test> {
  private readonly storage = new AsyncLocalStorage<TestRequest<Test>>();
  private requests: TestRequest<Test>[] = [];
  /** Those of `fetch` whose response has begun. */
  private readonly fetched = new WeakSet<object>();

  /** @param currentTest the one that a request belongs to which comes now */
  constructor(private readonly currentTest: () => Test) {}

  /** While tests run only: the channels are those of the process, and outlive a test file. */
  start(): void {
    for (const [channel, listener] of Object.entries(this.listeners)) subscribe(channel, listener);
  }

  stop(): void {
    for (const [channel, listener] of Object.entries(this.listeners)) unsubscribe(channel, listener);
    this.requests = [];
  }

  /** Lets the code of a test be known as such, also when the test has been given up. */
  runTest<T>(test: Test, work: () => T): T {
    return this.storage.run({ test, name: undefined, state: 'answered' }, work);
  }

  get current(): TestRequest<Test> | undefined {
    return this.storage.getStore();
  }

  /** The names of those of a test that nobody has waited for. One that its client has given up is seen to be gone a moment later. */
  async leftIn(test: Test): Promise<string[]> {
    // supertest sends when its server listens.
    await nextTurn();
    const left = this.running.filter((request) => request.test === test);
    for (const end = performance.now() + GONE_WITHIN_MS; performance.now() < end && left.some(isRunning); ) await nextTurn();
    return [...new Set(left.flatMap(({ name, state }) => (state !== 'gone' && name) || []))];
  }

  private get running(): TestRequest<Test>[] {
    return this.requests.filter(isRunning);
  }

  private add(name: string, state: () => TestRequest['state']): TestRequest<Test> {
    const request: TestRequest<Test> = {
      test: this.currentTest(),
      name: name.replace(/\?.*/, ''),
      get state() {
        return state();
      },
    };
    this.requests = [...this.running, request];
    return request;
  }

  private onServed({ request, response }: Served): void {
    const known = this.add(`${request.method} ${request.url}`, () => {
      // One that goes on for long (server-sent events) is none of ours, unless it has a transaction.
      if (response.headersSent || response.writableEnded) return 'answered';
      return response.destroyed || request.socket.destroyed ? 'gone' : 'running';
    });
    // For what follows of this request, and for nothing else.
    this.storage.enterWith(known);
  }

  private onSent({ request }: Sent): void {
    if (!this.isTests(request.host)) return;
    this.add(`${request.method} ${request.path}`, () => {
      if (request.res) return 'answered';
      return request.destroyed ? 'gone' : 'running';
    });
  }

  private onFetched({ request }: Fetched): void {
    if (!this.isTests(new URL(request.origin).hostname)) return;
    this.add(`${request.method} ${request.path}`, () => {
      if (this.fetched.has(request)) return 'answered';
      return request.aborted ? 'gone' : 'running';
    });
  }

  private readonly listeners: Record<string, (message: unknown) => void> = {
    'http.server.request.start': (message) => this.onServed(message as Served),
    'http.client.request.start': (message) => this.onSent(message as Sent),
    'undici:request:create': (message) => this.onFetched(message as Fetched),
    'undici:request:headers': (message) => this.fetched.add((message as Fetched).request),
  };

  /** Whether the test itself has sent it, to this machine; it may not have arrived yet. What the application sends is its own affair. */
  private isTests(host: string): boolean {
    return this.current?.name === undefined && /^(?:localhost$|127\.|\[?::1)/.test(host);
  }
}

function isRunning({ state }: TestRequest): boolean {
  return state === 'running';
}

/** What Node, and the `fetch` in it, tell. */
interface Served {
  readonly request: IncomingMessage;
  readonly response: ServerResponse;
}
interface Sent {
  readonly request: ClientRequest & { readonly res?: IncomingMessage };
}
interface Fetched {
  readonly request: {
    readonly origin: string;
    readonly method: string;
    readonly path: string;
    readonly completed: boolean;
    readonly aborted: boolean;
  };
}

const GONE_WITHIN_MS = 50;
