import { Client } from 'pg';
import type { TestDatabase } from './database';
import { eventually } from './pool';

/** The advisory lock on which a COMMIT waits that is to wait: see ledger.ts. */
const KEY = 1;

/** Something in the database that a statement, or a COMMIT, waits for: the server is at work on it then. */
export class Lock {
  private holder: Client | undefined;
  private circle: Promise<unknown> | undefined;

  constructor(private readonly database: TestDatabase) {}

  /** What waits for the lock. */
  readonly statement = `SELECT pg_advisory_xact_lock(${KEY})`;

  async hold(): Promise<void> {
    this.holder = new Client({ connectionString: this.database.adminUrl });
    // A restart of the server ends it too.
    this.holder.on('error', () => {});
    await this.holder.connect();
    await this.holder.query(`SELECT pg_advisory_lock(${KEY})`);
  }

  /** Waits until somebody waits for it, or for a lock of another key. */
  async reached(key = KEY): Promise<void> {
    await eventually(async () => {
      const { rows } = await this.database.admin.raw(
        `SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objid = ? AND NOT granted
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`,
        [key],
      );
      expect(rows).toHaveLength(1);
    });
  }

  /** Its holder waits for another lock, which somebody holds who is about to wait for this one: a deadlock, which he will be the first to notice. */
  async closeCircle(key: number): Promise<void> {
    await this.holder?.query("SET deadlock_timeout = '1h'");
    this.circle = this.holder?.query('SELECT pg_advisory_lock($1)', [key]);
    await this.reached(key);
  }

  async release(): Promise<void> {
    const { holder } = this;
    this.holder = undefined;
    await this.circle;
    await holder?.end();
  }
}
