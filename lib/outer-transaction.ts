import type { Transform } from 'node:stream';
import type { Knex } from 'knex';
import type { Connection, KnexClient } from './connection';
import { TransactionAbortedError } from './errors';
import type { Statement } from './postgres';

/**
 * A session inside someone else's `Knex.Transaction`: a savepoint in it, which Knex opens and ends, one after the other.
 * Its commit is a RELEASE: the work is stored when the outer transaction commits.
 */
export class OuterTransaction implements Connection {
  readonly hasBegun = true;
  readonly lostBecause = undefined;
  /** Whose statement runs, and so whose listeners hear of it. */
  private current: KnexClient | undefined;

  private constructor(
    private readonly savepoint: Knex.Transaction,
    private readonly connection: { __knexUid?: string },
  ) {
    for (const event of ['query', 'query-error']) {
      savepoint.client.on(event, (...values: unknown[]) => this.current?.emit(event, ...values));
    }
  }

  static async join(outer: Knex.Transaction, client: KnexClient): Promise<OuterTransaction> {
    const savepoint = await outer.transaction();
    const joined = new OuterTransaction(savepoint, await savepoint.client.acquireConnection());
    joined.current = client;
    return joined;
  }

  get knexUid(): string | undefined {
    return this.connection.__knexUid;
  }

  query(client: KnexClient, statement: Statement): Promise<unknown> {
    this.current = client;
    return this.savepoint.client.query(this.connection, statement);
  }

  stream(client: KnexClient, statement: Statement, _txid: string, stream: Transform, options: unknown): Promise<unknown> {
    this.current = client;
    return this.savepoint.client.stream(this.connection, statement, stream, options);
  }

  whenReady(): Promise<boolean> {
    return Promise.resolve(true);
  }

  hasEndedByItself(): boolean {
    return false;
  }

  async commit(abortedBy: unknown): Promise<void> {
    if (abortedBy !== undefined) {
      // RELEASE would fail, and leave the outer transaction aborted.
      await this.rollback();
      throw new TransactionAbortedError(abortedBy);
    }
    await this.savepoint.commit();
    // Knex's commit() resolves even if it failed; this promise tells.
    await this.savepoint.executionPromise;
  }

  async rollback(): Promise<void> {
    await this.savepoint.rollback();
  }

  release(): void {
    this.savepoint.client.releaseConnection(this.connection);
  }

  cancel(): Promise<unknown> {
    return this.savepoint.client.cancelQuery(this.connection);
  }
}
