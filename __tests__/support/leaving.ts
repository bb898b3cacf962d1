import { EventEmitter, once } from 'node:events';
import type { RawClient } from './http';

/** For `describe.each`: how a client may go away. */
export const waysToLeave: [string, (client: RawClient) => Promise<unknown>][] = [
  ['RST', (client) => client.reset()],
  ['FIN', (client) => client.destroy()],
  ['FIN, while it still listens', (client) => client.end()],
];

export interface MeetingPoint {
  /** For the handler: tells that it is there, and waits until it may go on. */
  arrive(): Promise<void>;
  /** For the test: settles when the handler is there. */
  reached: Promise<void>;
  goOn(): void;
}

/** A point in a handler where the test does something. */
export function meetingPoint(): MeetingPoint {
  const events = new EventEmitter();
  const [reached, left] = ['reached', 'left'].map((event) => once(events, event).then(() => {})) as [Promise<void>, Promise<void>];
  return {
    reached,
    arrive() {
      events.emit('reached');
      return left;
    },
    goOn() {
      events.emit('left');
    },
  };
}
