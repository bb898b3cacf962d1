import type { Request, RequestHandler, Response } from 'express';
import { type SessionChannel, sessionChannels, type TransactionMessage } from 'express-knex-session';

/** What the page is told of a request, each time that something happens to it. No values: neither of the request, nor of its SQL. */
export interface LiveRequest {
  /** That of its X-Request-Id. */
  readonly id: string;
  readonly method: string;
  /** Its path, in which ids are written `:id`. */
  readonly route: string;
  /** When its phase began, as `performance.now()` tells the time. */
  at: number;
  /** `running`: it has no connection, and does not want one. */
  phase: 'running' | 'waiting' | 'holding' | 'settling' | 'responding' | 'done';
  decision?: TransactionMessage['decision'];
  outcome: NonNullable<TransactionMessage['outcome']> | 'none';
  reason?: TransactionMessage['reason'];
  /** The code of the error that has rolled it back. */
  error?: string | undefined;
  waitedMs?: number | undefined;
  heldMs?: number | undefined;
  statements: number;
  bytesHeld: number;
  /** Of the response; undefined if it was not sent to its end. */
  status?: number;
  /** Its session was used after its end. */
  isLate?: boolean;
  /** Its connection was destroyed in place of being given back. */
  isConnectionDestroyed?: boolean;
}

/** Follows requests and their transactions, while it is told to. */
export class Follower {
  private readonly views = new WeakMap<object, LiveRequest>();
  private readonly underWay = new Set<LiveRequest>();
  /** Those whose response has ended before their transaction: the client went away, or COMMIT of what was only read is not waited for. */
  private readonly closed = new WeakSet<LiveRequest>();
  private isFollowing = false;

  private readonly subscriptions = [
    subscription(sessionChannels.acquire, (message) => this.enter('waiting', message)),
    subscription(sessionChannels.open, (message) => this.enter('holding', message)),
    subscription(sessionChannels.settle, (message) => this.enter('settling', message)),
    subscription(sessionChannels.settled, (message) => this.enter('responding', message)),
    subscription(sessionChannels.late, ({ request }) => this.change(request, { isLate: true })),
    subscription(sessionChannels.destroyed, ({ request }) => this.change(request, { isConnectionDestroyed: true })),
  ];

  /** @param tell called at each change */
  constructor(private readonly tell: (request: LiveRequest) => void) {}

  /** From now on, requests that begin are followed. */
  start(): void {
    this.isFollowing = true;
    for (const { begin } of this.subscriptions) begin();
  }

  /** Without subscribers the channels cost nothing. */
  stop(): void {
    this.isFollowing = false;
    for (const { end } of this.subscriptions) end();
    this.underWay.clear();
  }

  requestsUnderWay(): LiveRequest[] {
    return [...this.underWay];
  }

  /** Mounted before the session, so that requests are seen that never touch it. */
  readonly middleware: RequestHandler = (req, res, next) => {
    // Not those by which the page looks what has become of the others.
    if (this.isFollowing && !req.get('live-page')) {
      this.begin(req);
      // A pipelined response that still waits for the one before it tells of no `close` when its connection is reset.
      const { socket } = req;
      const close = (): void => {
        res.removeListener('close', close);
        socket.removeListener('close', close);
        this.close(req, res);
      };
      res.once('close', close);
      socket.once('close', close);
    }
    next();
  };

  private begin(req: Request): void {
    const { id, method, path } = req;
    const route = withoutIds(path);
    const view: LiveRequest = { id, method, route, at: performance.now(), phase: 'running', outcome: 'none', statements: 0, bytesHeld: 0 };
    this.views.set(req, view);
    this.underWay.add(view);
    this.tell(view);
  }

  private enter(phase: LiveRequest['phase'], message: TransactionMessage): void {
    const { request, decision, outcome = 'none', reason, error, waitedMs, heldMs, statements, bytesHeld } = message;
    const view = request && this.views.get(request);
    const isEnd = phase === 'responding' && view && this.closed.has(view);
    const news: Partial<LiveRequest> = { decision, outcome, reason, error: codeOf(error), waitedMs, heldMs, statements, bytesHeld };
    this.change(request, { ...news, at: performance.now(), phase: isEnd ? 'done' : phase });
  }

  private close(req: Request, res: Response): void {
    const view = this.views.get(req) as LiveRequest;
    if (res.writableFinished) view.status = res.statusCode;
    if (view.phase === 'running' || view.phase === 'responding') this.change(req, { at: performance.now(), phase: 'done' });
    else this.closed.add(view);
  }

  private change(request: object | undefined, news: Partial<LiveRequest>): void {
    const view = request && this.views.get(request);
    if (!view) return;
    Object.assign(view, news);
    if (view.phase === 'done') this.underWay.delete(view);
    this.tell(view);
  }
}

function subscription<Message>(channel: SessionChannel<Message>, listener: (message: Message) => void) {
  return { begin: () => channel.subscribe(listener), end: () => channel.unsubscribe(listener) };
}

const withoutIds = (path: string): string => path.replace(/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/gi, ':id');

function codeOf(error: unknown): string | undefined {
  const { code } = Object(error) as { code?: unknown };
  return error === undefined || error === null ? undefined : typeof code === 'string' ? code : 'an error';
}
