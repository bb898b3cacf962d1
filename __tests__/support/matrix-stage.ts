import express, { type Express, type Request, type RequestHandler, type Response } from 'express';
import { type Outcome, type Session, type SessionOptions, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { type Answer, get, keepAliveAgent, type Listening, RawClient } from './http';
import { type MeetingPoint, meetingPoint } from './leaving';
import { answerErrors, express5Flavour, type Handler, type Ledger, openTransactions, useLedger } from './ledger';
import type { Moment } from './matrix';
import { Lock } from './matrix-lock';
import { moments } from './matrix-moments';
import { isDestroyed, PoolRecord, type Resource } from './matrix-pool';
import { eventually, poolUsage } from './pool';
import { ended } from './wire';
import type { WireProxy } from './wire-proxy';

export interface StageOptions extends SessionOptions {
  /** Settings of the server for the connections of the pool. */
  settings?: Record<string, string | number>;
  /** The pool has no connection yet. */
  isCold?: boolean;
  /** The client is a socket in the test's hands: {@link Stage.client}. */
  isRaw?: boolean;
}

/** What must be true after a request. */
export interface Ending {
  /** What the client received; nothing is looked at if it has gone. */
  answer?: Partial<Answer>;
  /** The one error that came to the application's error handler. */
  error?: unknown;
  /** The one error that came to `onError`. */
  reported?: unknown;
  outcome: Outcome;
  /** The notes in the database, as everybody sees them. */
  stored: string[];
  /** What has become of the one connection that the request took, if it took one. */
  connection: 'kept' | 'destroyed' | 'none';
}

export const ok: Partial<Answer> = { status: 201, body: '"ok"', complete: true };

/** One request to an app on a pool of one connection, which is open and idle, behind a proxy. */
export class Stage {
  /** Where the handler, or the response, waits at some moments. */
  readonly point: MeetingPoint = meetingPoint();
  /** What came to the error handler. */
  readonly errors: any[] = [];
  /** What came to `onError`. */
  readonly reported: any[] = [];
  readonly middleware: ReturnType<typeof sessionMiddleware>;
  readonly lock: Lock;
  session!: Session;
  response!: Response;
  /** What the handler ended with. */
  thrown: unknown;
  client!: RawClient;
  answer: Promise<Answer> | undefined;
  /** What a middleware outside of the session does with the response's end. */
  onEnd: (() => Promise<void>) | undefined;

  private readonly agent = keepAliveAgent();
  private readonly record: PoolRecord;
  private idle: Resource | undefined;
  private handler!: Handler;
  private listening!: Listening;

  private constructor(
    private readonly ledger: Ledger,
    readonly knex: Knex,
    readonly proxy: WireProxy,
    private readonly isRaw: boolean,
    options: SessionOptions,
  ) {
    this.middleware = sessionMiddleware(knex, { onError: (error) => this.reported.push(error), ...options });
    this.lock = new Lock(ledger.database);
    this.record = new PoolRecord(knex);
  }

  static async open(ledger: Ledger, { settings = {}, isCold = false, isRaw = false, ...options }: StageOptions = {}): Promise<Stage> {
    const { proxy } = await ledger.throughProxy();
    const url = new URL(proxy.url);
    const flags = Object.entries(settings).map(([name, value]) => `-c ${name}=${value}`);
    if (flags.length > 0) url.searchParams.set('options', flags.join(' '));
    const knex = ledger.pool({ connection: url.href, pool: { min: 0, max: 1 } });
    if (!isCold) await knex.raw('SELECT 1');

    const stage = new Stage(ledger, knex, proxy, isRaw, options);
    stage.idle = knex.client.pool.free[0]?.resource;
    proxy.reset();
    stage.listening = await ledger.listen(stage.app());
    return stage;
  }

  /** The connection that the request has taken. */
  get taken(): Resource | undefined {
    return this.record.acquired[0];
  }

  get isLost(): boolean {
    return this.taken !== undefined && isDestroyed(this.taken);
  }

  get acquired(): number {
    return this.record.acquired.length;
  }

  /** Sends the request; this handler serves it. */
  async send(handler: Handler): Promise<void> {
    this.handler = handler;
    if (this.isRaw) this.client = (await RawClient.connect(this.listening.port)).get('/');
    // One that hangs must not take the tests after it with it.
    else this.answer = get(this.listening.url, { agent: this.agent, signal: AbortSignal.timeout(5_000) });
  }

  /**
   * Sends a request whose handler inserts the note `a`, and brings it to a moment.
   *
   * @param then what the handler does after the moment
   */
  async play(moment: Moment, then?: Handler): Promise<void> {
    await moments[moment](this, then);
  }

  /** Lets the request go on from its moment. */
  async goOn(): Promise<void> {
    this.point.goOn();
    await this.lock.release();
  }

  /** Ends the backend of the request's connection, and waits until the driver knows. */
  async kill(): Promise<void> {
    const resource = this.taken as Resource;
    const known = ended(resource);
    await this.ledger.database.admin.raw('SELECT pg_terminate_backend(?)', [await this.ledger.database.backendOf(resource)]);
    await known;
  }

  /** Resets the TCP connection to the database, and waits until the driver knows. */
  async reset(): Promise<void> {
    const known = ended(this.taken as Resource);
    this.proxy.cut('reset');
    await known;
  }

  /** Waits until no connection is in use, and fails if that takes a second. */
  async isFree(): Promise<void> {
    await eventually(() => expect(poolUsage(this.knex)).toMatchObject({ used: 0, pendingAcquires: 0 }), 1_000);
  }

  /** How often the server was asked to cancel a statement. */
  get cancels(): number {
    return this.proxy.frontend.filter(({ type }) => type === 'CancelRequest').length;
  }

  /** Waits for the end of the request, and looks at all that must be true after any fault. */
  async ends({ answer, error, reported, outcome, stored, connection }: Ending): Promise<void> {
    const received = await this.answer;
    await eventually(() => expect(this.errors).toHaveLength(error === undefined ? 0 : 1));
    if (error !== undefined) expect(this.errors).toMatchObject([error]);
    if (answer) expect(received).toMatchObject(answer);
    await this.isFree();
    await eventually(() => expect(this.reported).toHaveLength(reported === undefined ? 0 : 1));
    if (reported !== undefined) expect(this.reported).toMatchObject([reported]);
    await this.expectConnection(connection);
    expect(this.session.outcome).toBe(outcome);

    await this.clear();
    // What the server does without us: the end of a COMMIT whose connection is lost.
    await eventually(async () => expect(await openTransactions(this.ledger.database.admin)).toEqual([]));
    await eventually(async () => expect(await this.ledger.stored()).toEqual(stored));
    await this.expectNextIsServed(connection);
    expect(await this.ledger.stored()).toEqual([...stored, 'next'].sort());
    this.record.expectBalanced();
    expect([this.errors.length, this.reported.length]).toEqual([error === undefined ? 0 : 1, reported === undefined ? 0 : 1]);
  }

  /** Takes all that disturbs away. */
  async clear(): Promise<void> {
    this.proxy.onFrontend(undefined);
    this.proxy.onBackend(undefined);
    this.proxy.resume();
    this.agent.destroy();
    await this.goOn();
  }

  private async expectConnection(expected: Ending['connection']): Promise<void> {
    if (!this.idle) return expect(expected).toBe('none');
    expect(new Set(this.record.acquired)).toEqual(new Set(expected === 'none' ? [] : [this.idle]));
    this.record.expectBalanced();
    if (expected === 'destroyed') await eventually(() => expect(isDestroyed(this.idle as Resource)).toBe(true), 1_000);
    else expect(isDestroyed(this.idle as Resource)).toBe(false);
  }

  private async expectNextIsServed(connection: Ending['connection']): Promise<void> {
    const insertNext: Handler = async (req, res) => {
      await req.session('notes').insert({ id: 'next' });
      res.status(201).json('ok');
    };
    const { url } = await this.ledger.serving(express5Flavour)(insertNext, { knex: this.knex });
    expect(await get(url, { signal: AbortSignal.timeout(5_000) })).toMatchObject(ok);
    if (!this.idle) return;
    const last = this.record.acquired.at(-1);
    if (connection === 'destroyed') expect(last).not.toBe(this.idle);
    else expect(last).toBe(this.idle);
  }

  private app(): Express {
    const app = express();
    app.use(this.holdEnd, this.middleware);
    app.use(async (req: Request, res, next) => {
      Object.assign(this, { session: req.session, response: res });
      try {
        await this.handler(req, res, next);
      } catch (error) {
        this.thrown = error;
        throw error;
      }
    });
    app.use(sessionErrorHandler(), answerErrors(this.errors));
    return app;
  }

  /** As express-session does it: the head is fixed, and the end waits for something that comes after the session. */
  private readonly holdEnd: RequestHandler = (_req, res, next) => {
    const end = res.end as (...args: unknown[]) => unknown;
    let isEnding = false;
    res.end = (...args: unknown[]) => {
      if (!this.onEnd) end.apply(res, args);
      else if (!isEnding) {
        isEnding = true;
        res.writeHead(res.statusCode);
        void this.onEnd().then(() => end.apply(res, args));
      }
      return res;
    };
    next();
  };
}

export interface Stages {
  readonly ledger: Ledger;
  open(options?: StageOptions): Promise<Stage>;
}

/** Stages for the tests of a file, which share a database. */
export function useStages(): Stages {
  const opened: Stage[] = [];
  // Before the ledger's own: it waits until its pools are at rest.
  afterEach(async () => {
    for (const stage of opened.splice(0)) await stage.clear();
  });
  const ledger = useLedger();
  return {
    ledger,
    async open(options) {
      const stage = await Stage.open(ledger, options);
      opened.push(stage);
      return stage;
    },
  };
}
