import { setTimeout as sleep } from 'node:timers/promises';
import { Client } from 'pg';
import type { Postgres } from '../tools/postgres.mjs';
import type { CommitFate, Network } from './network';
import type { Random } from './random';
import { applicationName } from './schema';

/** What the network and the server suffer, one after the other and sometimes at once. */
export class Faults {
  readonly counts: Record<string, number> = {};
  /** Those that last; they end in {@link Network.heal} at the latest. */
  private readonly lasting: Promise<unknown>[] = [];
  private readonly faults: Record<string, () => unknown> = {
    'backend killed': () => this.killBackend(),
    'server restarted': () => this.postgres.restart(),
    'connection cut': () => this.network.cutOne(),
    'all connections cut': () => this.network.cutAll(),
    'COMMIT lost': () => this.meetCommits('lose'),
    'answer to COMMIT lost': () => this.meetCommits('lose answer'),
    'answer to COMMIT swallowed': () => this.meetCommits('swallow answer'),
    'slow network': () => this.last(300, 1_500, () => ({ delayMs: this.random.between(5, 60) }), { delayMs: 0 }),
    'sliced bytes': () => this.last(300, 1_500, () => ({ isSlicing: true }), { isSlicing: false }),
    'black hole': () => this.blackHole(),
  };
  private readonly weights = {
    ...Object.fromEntries(Object.keys(this.faults).map((name) => [name, 4])),
    'backend killed': 8,
    'server restarted': 1,
    'all connections cut': 2,
    'black hole': 2,
  };

  constructor(
    private readonly random: Random,
    private readonly network: Network,
    private readonly postgres: Postgres,
  ) {}

  /** Each fault at least once, if there is time; then by chance. */
  async rage(seconds: number): Promise<void> {
    const end = performance.now() + seconds * 1_000;
    const order = this.random.shuffled(Object.keys(this.faults));
    while (performance.now() < end) {
      const name = order.shift() ?? this.random.weighted(this.weights);
      await this.faults[name]?.();
      this.counts[name] = (this.counts[name] ?? 0) + 1;
      await sleep(Math.min(this.random.between(50, 700), Math.max(0, end - performance.now())));
    }
    this.network.heal();
    await Promise.all(this.lasting);
    this.network.heal();
  }

  private meetCommits(fate: CommitFate): void {
    for (let left = this.random.between(1, 3); left > 0; left--) this.network.commitFates.push(fate);
  }

  private last(shortest: number, longest: number, begin: () => Partial<Network>, end: Partial<Network>): void {
    Object.assign(this.network, begin());
    this.lasting.push(sleep(this.random.between(shortest, longest)).then(() => Object.assign(this.network, end)));
  }

  private blackHole(): void {
    this.network.swallowAll();
    this.lasting.push(sleep(this.random.between(300, 2_500)).then(() => this.network.letPass()));
  }

  private async killBackend(): Promise<void> {
    const sql = `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '${applicationName}' ORDER BY random() LIMIT 1`;
    // Just restarted, the server may not be ready: another time, then.
    await queryOnce(this.postgres.url, sql).catch(() => {});
  }
}

/** On a connection of its own, past the network. */
export async function queryOnce<Row extends object>(url: string, sql: string): Promise<Row[]> {
  const client = new Client({ connectionString: url });
  client.on('error', () => {});
  await client.connect();
  try {
    return (await client.query<Row>(sql)).rows;
  } finally {
    await client.end();
  }
}
