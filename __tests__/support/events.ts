import {
  type ConnectionDestroyedMessage,
  type LateUseMessage,
  type OpenLongMessage,
  type SessionChannel,
  type SessionChannels,
  sessionChannels,
  type TransactionMessage,
} from 'express-knex-session';
import { eventually } from './pool';

export type ChannelName = keyof SessionChannels;

export interface Told {
  channel: ChannelName;
  message: any;
  /** The message as it was then. */
  asTold: any;
}

export interface Events {
  /** All messages of this test, in order. */
  told: Told[];
  /** The channels in their order; of one message, or of all. */
  order(message?: TransactionMessage): ChannelName[];
  /** What has settled, once there are that many; as it was told. */
  settled(count?: number): Promise<TransactionMessage[]>;
  late(): LateUseMessage[];
  long(): OpenLongMessage[];
  destroyed(): ConnectionDestroyedMessage[];
}

const channels = Object.entries(sessionChannels) as [ChannelName, SessionChannel<any>][];

/** Listens on all channels during each test. After it: whatever has asked for a connection has settled, once, and in order. */
export function useEvents(): Events {
  let listeners: [SessionChannel<any>, (message: any) => void][] = [];
  const told: Told[] = [];
  const of = (name: ChannelName): Told[] => told.filter(({ channel }) => channel === name);
  const all = <T>(name: ChannelName): T[] => of(name).map(({ message }) => message);

  const events: Events = {
    told,
    order: (wanted) => told.filter(({ message }) => wanted === undefined || message === wanted).map(({ channel }) => channel),
    settled: (count = 1) =>
      eventually(() => {
        expect(of('settled')).toHaveLength(count);
        return of('settled').map(({ asTold }) => asTold);
      }),
    late: () => all('late'),
    long: () => all('long'),
    destroyed: () => all('destroyed'),
  };

  beforeEach(() => {
    listeners = channels.map(([name, channel]) => {
      const listener = (message: any): void => void told.push({ channel: name, message, asTold: { ...message } });
      channel.subscribe(listener);
      return [channel, listener];
    });
  });
  afterEach(async () => {
    const messages = all<TransactionMessage>('acquire');
    await eventually(() => expect(of('settled').map(({ message }) => message)).toHaveLength(messages.length));
    for (const [channel, listener] of listeners) expect(channel.unsubscribe(listener)).toBe(true);
    for (const message of messages) isSound(message, events.order(message));
    expect(new Set(messages).size).toBe(messages.length);
    told.length = 0;
  });
  return events;
}

function isSound(message: TransactionMessage, order: ChannelName[]): void {
  const { waitedMs, heldMs, statements, lastStatement, decision, outcome, reason } = message;
  expect(order.join(' ')).toMatch(/^acquire( open( settle)?)? settled$/);
  expect(waitedMs).toBeGreaterThanOrEqual(0);
  if (order.includes('open')) expect(heldMs).toBeGreaterThanOrEqual(0);
  else expect({ heldMs, statements, outcome }).toEqual({ heldMs: undefined, statements: 0, outcome: 'unused' });
  expect(decision !== undefined).toBe(order.includes('settle'));
  expect(lastStatement !== undefined).toBe(statements > 0);
  expect({ outcome, reason }).toEqual({ outcome: expect.any(String), reason: expect.any(String) });
  // What was not committed was not asked to be, or has an error that says why.
  if (outcome === 'committed') expect(decision).toBe('commit');
}
