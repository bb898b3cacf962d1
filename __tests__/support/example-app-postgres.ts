import { chmod, mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import createKnex, { type Knex } from 'knex';
import { type Started, startExampleApp } from './example-app';

/** A folder in which the example app keeps a PostgreSQL of its own, one start after the other. */
export class OwnPostgres {
  private apps: Started[] = [];

  private constructor(private readonly folder: string) {}

  static async inNewFolder(): Promise<OwnPostgres> {
    const folder = await mkdtemp(join(tmpdir(), 'ledger-'));
    await chmod(folder, 0o755); // As root, another user runs the server.
    return new OwnPostgres(folder);
  }

  start(): Started {
    const app = startExampleApp({ DATABASE_URL: '', DATA_DIR: this.dataDir });
    this.apps.push(app);
    return app;
  }

  async crash(): Promise<void> {
    const { pid } = await this.server();
    process.kill(pid, 'SIGQUIT'); // As PostgreSQL understands it: all at once, with a recovery at the next start.
  }

  async withAdmin(use: (admin: Knex) => Promise<void>): Promise<void> {
    const { port } = await this.server();
    const password = await readFile(join(this.dataDir, 'password.txt'), 'utf8');
    const admin = createKnex({ client: 'pg', connection: { host: '127.0.0.1', port, user: 'postgres', password, database: 'postgres' } });
    await use(admin).finally(() => admin.destroy());
  }

  async remove(): Promise<void> {
    for (const app of this.apps) {
      app.signal('SIGTERM');
      await app.exit;
    }
    await rm(this.folder, { recursive: true, force: true });
  }

  private get dataDir(): string {
    return join(this.folder, 'data');
  }

  private async server(): Promise<{ pid: number; port: number }> {
    const [pid, , , port] = (await readFile(join(this.dataDir, 'postmaster.pid'), 'utf8')).split('\n');
    return { pid: Number(pid), port: Number(port) };
  }
}
