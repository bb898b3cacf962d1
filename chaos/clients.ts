/* The clients, in a process of their own. */
import { setTimeout as sleep } from 'node:timers/promises';
import { keepAliveAgent, RawClient, request } from '../__tests__/support/http';
import { completeAnswers } from './answers';
import { answerQuestions, settingsOf, tell } from './child';
import { type KindName, kindNames, kinds, type RequestRecord, rowCounts, stormSettings, type Transfer } from './kinds';
import { Random } from './random';

export interface ClientSettings {
  port: number;
  seed: number;
  /** How long a client may wait between two requests. */
  pauseMs: number;
  /** How many of a hundred clients read slowly: each keeps a connection of the pool meanwhile. */
  slowReaders: number;
  /** In place of the usual ones. */
  weights?: Partial<Record<KindName, number>>;
}

interface Plan {
  id: string;
  kind: KindName;
  transfer: Transfer;
  how: string;
}

const rawManners = ['pipeline', 'reset', 'leave', 'half-close'] as const;

const { port, seed, pauseMs, slowReaders, weights: otherWeights } = settingsOf<ClientSettings>();
const usualWeights = Object.fromEntries(kindNames.map((name) => [name, kinds[name].weight])) as Record<KindName, number>;
const weights = { ...usualWeights, ...otherWeights };
/** A client that stays uses HTTP with keep-alive; one that does what clients should not has a socket in its hands. */
const manners = { stay: 72, pipeline: 6, 'read slowly': slowReaders, reset: 8, leave: 8, 'half-close': 5 };
let count = 0;
let isStorming = false;
let storming: Promise<unknown> = Promise.resolve();
/** They keep their connections while they pause. */
let clients: Client[] | undefined;
let records: RequestRecord[] = [];

answerQuestions({
  start() {
    isStorming = true;
    clients ??= Array.from({ length: stormSettings.clients }, (_, index) => new Client(index));
    storming = Promise.all(clients.map((client) => client.run()));
    const reporting = setInterval(() => tell(records.splice(0)), 500);
    storming = storming.finally(() => {
      clearInterval(reporting);
      tell(records.splice(0));
    });
  },
  async stop() {
    isStorming = false;
    await storming;
  },
  /** One request of each kind, by clients that stay; and one that reads slowly, for longer than a transaction may take. */
  async each(round: string) {
    records = [];
    const client = new Client(-1);
    // Accounts of their own: a handler that hangs must not keep another one waiting.
    const plans = kindNames.map((kind, index) => ({
      id: `${round}-${kind}`,
      kind,
      transfer: { from: 2 * index, to: 2 * index + 1, amount: 1 },
      how: 'stay',
    }));
    const slowPlan: Plan = { id: `${round}-slowly`, kind: 'manyRows', transfer: { from: 0, to: 1, amount: 1 }, how: 'read slowly' };
    await Promise.all([...plans.map((plan) => client.stay(plan)), client.readSlowly(slowPlan)]);
    return records.splice(0);
  },
});

class Client {
  private readonly random: Random;
  private previous = 'the first one';
  private readonly agent = keepAliveAgent();
  constructor(private readonly index: number) {
    this.random = new Random(seed + 1_000 * (index + 2));
  }

  async run(): Promise<void> {
    while (isStorming) {
      const manner = this.random.weighted(manners);
      if (manner === 'stay') await this.stay(this.plan(manner));
      else if (manner === 'read slowly') await this.readSlowly({ ...this.plan(manner), kind: 'manyRows' });
      else await this.behave(manner);
      await sleep(this.random.between(0, pauseMs));
    }
  }

  private plan(how: string): Plan {
    const { random } = this;
    const from = random.between(0, stormSettings.accounts - 1);
    const to = (from + random.between(1, stormSettings.accounts - 1)) % stormSettings.accounts;
    const id = `${this.index}-${count++}`;
    return { id, kind: random.weighted(weights), transfer: { from, to, amount: random.between(1, 50) }, how };
  }

  async stay(plan: Plan): Promise<void> {
    const { kind, id, transfer } = plan;
    const { method } = kinds[kind];
    const signal = AbortSignal.timeout(stormSettings.neverMs);
    const agent = this.index < 0 ? undefined : this.agent;
    const { status, body, complete, error } = await request(`http://127.0.0.1:${port}/${kind}/${id}`, {
      method,
      signal,
      ...(agent && { agent }),
      ...(method === 'POST' && { body: transfer }),
    });
    if (complete) noteAnswer(plan, status, body);
    else note({ ...plan, how: `${plan.how}, ${error?.code}, ${this.previous}` }, signal.aborted ? 'never' : 'cut');
    this.previous = `after ${kind} ${id}: ${status}`;
  }

  async readSlowly(plan: Plan): Promise<void> {
    const client = await RawClient.connect(port);
    client.write(bytesOf(plan));
    for (let pause = 0; pause < 3; pause++) {
      client.pause();
      await sleep(this.random.between(50, 600));
      client.resume();
      await sleep(10);
    }
    await this.listen(client, [plan]);
  }

  private async behave(manner: (typeof rawManners)[number]): Promise<void> {
    const client = await RawClient.connect(port);
    const plans = Array.from({ length: this.random.between(1, 3) }, () => this.plan(manner));
    client.write(plans.map(bytesOf).join(''));
    if (manner === 'pipeline') return await this.listen(client, plans);

    await Promise.race([sleep(this.random.between(0, 150)), client.closed]);
    if (manner === 'half-close') client.socket.end();
    else await (manner === 'reset' ? client.reset() : client.destroy());
    // After half a close, what still comes must be true as well.
    await Promise.race([client.closed, sleep(stormSettings.neverMs)]);
    client.destroy();
    noteAnswers(plans, client, 'left');
  }

  /** Reads until all have been answered, or the server has closed the connection. */
  private async listen(client: RawClient, plans: Plan[]): Promise<void> {
    const gaveUp = sleep(stormSettings.neverMs).then(() => 'never' as const);
    const answered = client.readUntil((received) => completeAnswers(received).length === plans.length);
    const end = await Promise.race([gaveUp, answered.then(...both('cut'))]);
    client.destroy();
    noteAnswers(plans, client, end);
  }
}

/** Whichever way a promise goes. */
function both<const T>(value: T): [() => T, () => T] {
  return [() => value, () => value];
}

function bytesOf({ kind, id, transfer }: Plan): string {
  const { method } = kinds[kind];
  const body = method === 'POST' ? JSON.stringify(transfer) : '';
  const headers = ['Host: localhost', 'Content-Type: application/json', `Content-Length: ${body.length}`];
  return [`${method} /${kind}/${id} HTTP/1.1`, ...headers, '', body].join('\r\n');
}

function noteAnswers(plans: Plan[], { received }: RawClient, end: RequestRecord['end']): void {
  const answers = completeAnswers(received);
  const how = `${plans[0]?.how}: ${plans.map(({ kind }, index) => `${kind} ${answers[index]?.status ?? end}`).join(', ')}`;
  for (const [index, plan] of plans.entries()) {
    const answer = answers[index];
    if (answer) noteAnswer(plan, answer.status, answer.body);
    else note({ ...plan, how }, end === 'cut' && index > 0 && (index > answers.length || answers[index - 1]?.isLast) ? 'unserved' : end);
  }
}

function note({ id, kind, how }: Plan, end: RequestRecord['end']): void {
  records.push({ id, kind, end, status: 0, code: undefined, isWrong: false, how });
}

function noteAnswer({ id, kind, how }: Plan, status: number, body: string): void {
  const record: RequestRecord = { id, kind, end: 'answered', status, code: undefined, isWrong: false, how };
  if (body.startsWith('{')) {
    const answer = JSON.parse(body) as { id?: string; code?: string };
    record.code = answer.code;
    record.isWrong = answer.id !== id;
  } else if (kind === 'rows' || kind === 'manyRows') record.isWrong = body.split('\n').length - 1 !== rowCounts[kind];
  else record.isWrong = body !== `${id}\n\n`;
  records.push(record);
}
