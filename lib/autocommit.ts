import type { Transform } from 'node:stream';
import { Acquisition } from './acquisition';
import { AUTOCOMMIT } from './beginning';
import type { KnexClient } from './connection';
import { settledWithin } from './deadline';
import { SessionError } from './errors';
import type { Level } from './open-savepoints';
import { controlsTransaction, type Statement } from './postgres';
import type { Terms } from './resolve-options';
import { Lease } from './statement-queue';
import { refuseControl } from './statement-runner';
import { Transaction } from './transaction';

/** In place of a transaction: each statement takes a connection of the pool for itself, and commits by itself. */
export class Autocommit extends Transaction {
  override readonly isAutocommit = true;
  private terms: Terms | undefined;

  /** What was asked of the transaction before its first statement holds. */
  static inPlaceOf({ owner, interruption, hooks, rollbackOnly }: Transaction): Autocommit {
    if (rollbackOnly) throw nothingToRollBack('setRollbackOnly');
    const autocommit = new Autocommit(owner, interruption);
    autocommit.hooks = hooks;
    return autocommit;
  }

  override next(): Autocommit {
    return new Autocommit(this.owner, this.interruption);
  }

  override setRollbackOnly(): void {
    throw nothingToRollBack('setRollbackOnly');
  }

  override async lease(level: Level): Promise<Lease> {
    this.assertOpen();
    this.terms ??= this.owner.onFirstUse();
    const acquisition = new Acquisition((wish) => this.owner.connect(wish, AUTOCOMMIT), this.terms.acquireTimeout);
    return new Lease(await acquisition.connection, level, false, this);
  }

  override returnLease(lease: Lease): void {
    if (lease.isReturned) return;
    lease.isReturned = true;
    // One that Knex has given up still runs.
    if (!lease.isRunning || lease.__knex__disposed) void this.giveBack(lease);
  }

  override query(lease: Lease, client: KnexClient, statement: Statement): Promise<unknown> {
    return this.runAlone(lease, statement, () => lease.connection.query(client, statement, undefined));
  }

  override stream(lease: Lease, client: KnexClient, statement: Statement, stream: Transform, options: unknown): Promise<void> {
    return this.runAlone(lease, statement, async () => {
      await lease.connection.stream(client, statement, undefined, stream, options);
    });
  }

  private async runAlone<T>(lease: Lease, statement: Statement, send: () => Promise<T>): Promise<T> {
    if (lease.isReturned) throw new Error('Invalid connection for a query.');
    if (statement.method === 'raw' && controlsTransaction(statement.sql)) throw refuseControl();
    lease.isRunning = true;
    try {
      const result = await send();
      this.outcome = 'committed';
      return result;
    } finally {
      lease.isRunning = false;
      if (lease.isReturned && !lease.hasPassed) void this.giveBack(lease);
    }
  }

  /** After an error, or a stream that was not read to its end, the server may still be at work; one that does not end is not given back. */
  private async giveBack(lease: Lease): Promise<void> {
    const { connection, __knex__disposed: reason } = lease;
    lease.hasPassed = true;
    // Knex has given it up, and it will be destroyed.
    if (reason === undefined) await settledWithin((this.terms as Terms).settleTimeout, Promise.resolve(connection.whenReady()));
    connection.release(reason);
  }
}

export function nothingToRollBack(name: string): SessionError {
  return new SessionError(
    'ERR_NO_TRANSACTION',
    `session.${name}() was called, but this request has no transaction ({ transaction: false }): its statements have committed.`,
  );
}
