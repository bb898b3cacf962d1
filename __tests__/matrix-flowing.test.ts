import type { Handler } from './support/ledger';
import { type Ending, type Stage, type StageOptions, useStages } from './support/matrix-stage';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const stages = useStages();

const rolledBack = { outcome: 'rolled back', stored: [] } satisfies Partial<Ending>;
const cut = { answer: { status: 201, body: expect.stringMatching(/^begun, /), complete: false } };
const mine = new Error('mine');
const never: Handler = () => new Promise(() => {});

interface Case {
  fault: string;
  options?: StageOptions;
  last?: Handler;
  strike?: (stage: Stage) => Promise<unknown> | undefined;
  ending: Partial<Ending> & Pick<Ending, 'connection'>;
}

const cases: Case[] = [
  {
    fault: 'the backend is killed',
    strike: (stage) => stage.kill(),
    ending: { reported: { code: '57P01' }, connection: 'destroyed' },
  },
  {
    fault: 'the connection is reset',
    strike: (stage) => stage.reset(),
    ending: { reported: { code: 'ECONNRESET' }, connection: 'destroyed' },
  },
  {
    fault: 'the network is dead at COMMIT',
    options: { settleTimeout: 150 },
    strike: async (stage) => stage.proxy.pause(),
    ending: { reported: { code: 'ERR_COMMIT_UNKNOWN' }, outcome: 'unknown', stored: ['a'], connection: 'destroyed' },
  },
  {
    fault: 'the handler throws',
    last: () => Promise.reject(mine),
    ending: { error: mine, connection: 'kept' },
  },
  {
    fault: 'the handler hangs',
    options: { transactionTimeout: 150 },
    last: never,
    ending: { reported: { code: 'ERR_SESSION_TIMEOUT' }, connection: 'kept' },
  },
  {
    fault: 'the client aborts',
    options: { isRaw: true },
    last: never,
    strike: (stage) => stage.client.reset(),
    ending: { connection: 'kept' },
  },
  {
    fault: 'the app shuts down',
    last: never,
    strike: (stage) => stage.middleware.drain(50),
    ending: { reported: { code: 'ERR_SESSION_UNAVAILABLE' }, connection: 'destroyed' },
  },
];

// The matrix is that of the default, whose session has ended by then.
describe("fault, while bytes flow and the session is open (commitAt: 'end')", () => {
  it.each(cases)('$fault: the client never sees a complete response', async ({ options, last, strike, ending }) => {
    const stage = await stages.open({ commitAt: 'end', ...options });
    await stage.play('during the response', last);
    await strike?.(stage);
    // Who has gone, or hangs, does not go on.
    if (last !== never) await stage.goOn();
    await stage.ends({ ...(!options?.isRaw && cut), ...rolledBack, ...ending });
  });
});
