import type { Request, Response } from 'express';
import type { SessionOptions } from 'express-knex-session';
import type { Knex } from 'knex';
import { RawClient } from './http';
import { express5Flavour, type Handler, type Ledger, useLedger } from './ledger';
import { eventually, poolUsage } from './pool';

/** A statement that ends only when it is cancelled, as far as a test is concerned. */
export const ENDLESS = 'SELECT pg_sleep(30)';

export interface VictimOptions extends SessionOptions {
  /** Its pool must have one connection at most. */
  knex?: Knex;
  /** What the client sends. */
  head?: string;
  /** Whether the test asks for the signal before the handler runs. */
  asksForSignal?: boolean;
}

/** What the handler's last error should be: the reason of the signal, whose cause is what the server said to the cancelled statement. */
export const clientHasGone = { code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('client has disconnected') };
export const cancelled = { ...clientHasGone, cause: { code: '57014' } };

/** A request whose client leaves in the middle, on a pool whose one connection is open and idle before. */
export class Victim {
  client!: RawClient;
  request!: Request;
  response!: Response;
  /** The reasons of the signal, one for each time that it aborted. */
  readonly reasons: unknown[] = [];
  /** With what the handler has ended: undefined if it has not failed. */
  error: unknown;
  hasEnded = false;

  private constructor(
    private readonly ledger: Ledger,
    readonly knex: Knex,
    /** The backend of the one connection. */
    readonly pid: number,
  ) {}

  static async open(ledger: Ledger, handler: Handler, options: VictimOptions = {}): Promise<Victim> {
    const { knex = ledger.pool({ pool: { min: 0, max: 1 } }), head = 'GET / HTTP/1.1', asksForSignal = true, ...others } = options;
    const victim = new Victim(ledger, knex, await pidOf(knex));
    const { port } = await ledger.serving(express5Flavour)(
      async (req, res, next) => {
        Object.assign(victim, { request: req, response: res });
        const { session } = req;
        if (asksForSignal) session.signal.addEventListener('abort', () => victim.reasons.push(session.signal.reason));
        try {
          await handler(req, res, next);
        } catch (error) {
          victim.error = error;
          throw error;
        } finally {
          victim.hasEnded = true;
        }
      },
      { knex, ...others },
    );
    victim.client = await RawClient.connect(port);
    victim.client.write(`${head}\r\nHost: localhost\r\n\r\n`);
    return victim;
  }

  /** Waits until the server is at work on {@link ENDLESS}. */
  async isSleeping(): Promise<void> {
    await eventually(async () => expect(await this.backend()).toMatchObject({ state: 'active', wait_event: 'PgSleep' }));
  }

  /** What the server does on the connection. */
  async backend(): Promise<{ state: string; wait_event: string | null; query: string } | undefined> {
    return this.ledger.database.admin('pg_stat_activity').where({ pid: this.pid }).first('state', 'wait_event', 'query');
  }

  /** Within a second of the client's leaving the server has stopped, the connection is free, and the handler has heard. */
  async isOver(): Promise<void> {
    await eventually(async () => {
      expect(await this.backend()).toMatchObject({ state: 'idle' });
      expect(used(this.knex)).toBe(0);
      expect(this.hasEnded).toBe(true);
    }, 1_000);
  }

  /** Nothing is stored, and the same connection serves the next. */
  async leftNothing(): Promise<void> {
    expect(await this.ledger.stored()).toEqual([]);
    // A transaction that was left open would see its own row.
    expect(await this.knex('notes').pluck('id')).toEqual([]);
    expect(await pidOf(this.knex)).toBe(this.pid);
  }

  /** All that is promised of a client that leaves in a running statement. */
  async wasAborted(error: object = cancelled): Promise<void> {
    await this.isOver();
    expect(this.error).toMatchObject(error);
    expect(this.reasons).toEqual([this.error]);
    expect(this.reasons[0]).toBe(this.error);
    await this.leftNothing();
  }
}

export interface Aborts {
  readonly ledger: Ledger;
  open(handler: Handler, options?: VictimOptions): Promise<Victim>;
}

export function useAborts(): Aborts {
  const ledger = useLedger();
  return { ledger, open: (handler, options) => Victim.open(ledger, handler, options) };
}

export async function pidOf(knex: Knex): Promise<number> {
  const { rows } = await knex.raw('SELECT pg_backend_pid() AS pid');
  return rows[0].pid;
}

/** Connections in use, be it a pool of Knex or one of pg. */
export function used(knex: Knex): number {
  const { connectionPool } = knex.client.config;
  return connectionPool ? connectionPool.totalCount - connectionPool.idleCount : poolUsage(knex).used;
}
