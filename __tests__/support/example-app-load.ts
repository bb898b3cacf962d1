import { randomUUID } from 'node:crypto';
import { Agent } from 'node:http';
import type { Knex } from 'knex';
import { type Answer, request } from './http';

export interface Transfer {
  id: string;
  from: string;
  to: string;
  amount: number;
}

/**
 * What a client knows about a transfer that it sent.
 * `'stored'`: a complete success. `'refused'`: an error. `'unknown'`: an error that says so. `'unanswered'`: no answer, or only a part of one.
 * `'unheard'`: no connection was to be had.
 */
export type Fate = 'stored' | 'refused' | 'unknown' | 'unanswered' | 'unheard';

export interface Sent {
  transfer: Transfer;
  /** By `performance.now()`. */
  sentAt: number;
  answer: Answer;
  fate: Fate;
}

/** What is in the database, against what the clients know; all but `doubtful` must be empty. */
export interface Differences {
  /** Acknowledged, and not there as they were sent. */
  lost: Transfer[];
  /** There, although their clients were told of an error, or never got through. */
  lies: Sent[];
  /** There, and their clients do not know. */
  doubtful: Sent[];
  /** Transfers that are not two entries which sum to zero, and accounts that are not the sum of their entries. */
  torn: unknown[];
}

/** Clients that send transfers, one after the other, until they are stopped or nobody listens any more. */
export class TransferLoad {
  readonly sent: Sent[] = [];
  private readonly listeners = new Set<() => void>();
  private readonly clients: Promise<void>[] = [];
  private readonly agents: Agent[] = [];

  constructor(
    private readonly url: string,
    readonly accounts: { external: string[]; poor: string },
  ) {}

  /** Every other client keeps its connection. */
  start(clients: number): void {
    for (let i = 0; i < clients; i++) {
      const agent = i % 2 ? new Agent({ keepAlive: true, maxSockets: 1 }) : undefined;
      if (agent) this.agents.push(agent);
      this.clients.push(this.client(i, agent));
    }
  }

  async until(count: number, fate: Fate): Promise<void> {
    while (this.with(fate).length < count) await new Promise<void>((resolve) => this.listeners.add(resolve));
  }

  with(fate: Fate): Sent[] {
    return this.sent.filter((sent) => sent.fate === fate);
  }

  /** Resolves when nobody listens any more. */
  async ended(): Promise<void> {
    await Promise.all(this.clients);
    for (const agent of this.agents) agent.destroy();
  }

  async send(wanted: Partial<Transfer> = {}, agent?: Agent): Promise<Sent> {
    const [from = '', to = ''] = this.accounts.external;
    const transfer = { id: randomUUID(), from, to, amount: 5, ...wanted };
    const sentAt = performance.now();
    const answer = await request(`${this.url}/transfers`, { method: 'POST', body: transfer, ...(agent && { agent }) });
    const sent = { transfer, sentAt, answer, fate: fateOf(answer) };
    this.sent.push(sent);
    for (const listener of this.listeners) listener();
    this.listeners.clear();
    return sent;
  }

  async compareWith(admin: Knex): Promise<Differences> {
    const { rows } = await admin.raw(
      'select transfers.id, account_id as account, amount from transfers join entries on transfer_id = transfers.id',
    );
    const amounts = new Map<string, number>(rows.map(({ id, account, amount }: Row) => [`${id} ${account}`, Number(amount)]));
    const isThere = ({ transfer: { id, from, to } }: Sent) => amounts.has(`${id} ${from}`) || amounts.has(`${id} ${to}`);
    const isWhole = ({ transfer: { id, from, to, amount } }: Sent) =>
      amounts.get(`${id} ${from}`) === -amount && amounts.get(`${id} ${to}`) === amount;

    const { rows: torn } = await admin.raw(`
      select transfers.id from transfers left join entries on transfer_id = transfers.id
        group by transfers.id having count(entries.id) <> 2 or sum(amount) <> 0
      union all
      select accounts.id from accounts left join entries on account_id = accounts.id
        group by accounts.id having balance <> coalesce(sum(amount), 0)`);
    return {
      lost: this.with('stored').flatMap((sent) => (isWhole(sent) ? [] : sent.transfer)),
      lies: [...this.with('refused'), ...this.with('unheard')].filter(isThere),
      doubtful: [...this.with('unknown'), ...this.with('unanswered')].filter(isThere),
      torn,
    };
  }

  private async client(number: number, agent: Agent | undefined): Promise<void> {
    const { external, poor } = this.accounts;
    for (let i = 0; ; i++) {
      const from = external[(number + i) % external.length] ?? '';
      const to = external[(number + 2 * i + 1) % external.length] ?? '';
      // Some fail at COMMIT, as they do in life.
      const wanted = i % 7 === 3 || from === to ? { from: poor, to, amount: 1_000 } : { from, to, amount: 1 + i };
      const { fate } = await this.send(wanted, agent);
      if (fate === 'unheard') return;
    }
  }
}

type Row = { id: string; account: string; amount: string };

function fateOf({ status, complete, body, error }: Answer): Fate {
  if (error?.code === 'ECONNREFUSED') return 'unheard';
  if (status >= 400) return body.includes('outcome-unknown') ? 'unknown' : 'refused';
  return status > 0 && complete ? 'stored' : 'unanswered';
}
