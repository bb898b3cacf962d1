import { insert } from './support/ledger';
import { describeFault } from './support/matrix';
import { type Ending, ok, useStages } from './support/matrix-stage';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const stages = useStages();

const deadlines = { acquireTimeout: 150, transactionTimeout: 300, settleTimeout: 150 };
const timedOut = {
  answer: { status: 503 },
  error: { code: 'ERR_SESSION_TIMEOUT' },
  // The ROLLBACK that could not be sent.
  reported: { message: expect.stringContaining('settleTimeout') },
  outcome: 'rolled back',
  stored: [],
  connection: 'destroyed',
} satisfies Ending;

describeFault('black-holed network', {
  'before BEGIN': {
    async 'on a connection of the pool'() {
      const stage = await stages.open(deadlines);
      await stage.play('before BEGIN');
      stage.proxy.pause();
      await stage.goOn();
      await stage.ends(timedOut);
    },
    async 'on the way to a new connection'() {
      const stage = await stages.open({ ...deadlines, isCold: true });
      stage.proxy.pause();
      await stage.send(async (req) => {
        await insert(req, 'a');
      });
      const error = { code: 'ERR_SESSION_UNAVAILABLE', cause: { message: expect.stringContaining('acquireTimeout') } };
      expect(await stage.answer).toMatchObject({ status: 503 });
      // It comes too late, and is given back at once.
      stage.proxy.resume();
      await stage.ends({ answer: { status: 503 }, error, outcome: 'unused', stored: [], connection: 'none' });
    },
  },

  async 'during a statement'() {
    const stage = await stages.open(deadlines);
    await stage.play('during a statement');
    stage.proxy.pause();
    await stage.ends(timedOut);
    // Asked for, in vain.
    expect(stage.cancels).toBeGreaterThan(0);
    expect(stage.thrown).toBe(stage.errors[0]);
  },

  'between statements': {
    async 'a statement comes next'() {
      const stage = await stages.open(deadlines);
      await stage.play('between statements');
      stage.proxy.pause();
      await stage.goOn();
      await stage.ends(timedOut);
    },
    async 'COMMIT comes next'() {
      const stage = await stages.open(deadlines);
      await stage.play('between statements', (_req, res) => res.status(201).json('ok'));
      stage.proxy.pause();
      await stage.goOn();
      await stage.ends({
        answer: { status: 500 },
        error: { code: 'ERR_COMMIT_UNKNOWN', cause: { message: expect.stringContaining('settleTimeout') } },
        outcome: 'unknown',
        // The network has delivered it late.
        stored: ['a'],
        connection: 'destroyed',
      });
    },
    async 'ROLLBACK comes next'() {
      const stage = await stages.open(deadlines);
      await stage.play('between statements', (_req, res) => res.status(409).json('mine'));
      stage.proxy.pause();
      await stage.goOn();
      await stage.ends({
        answer: { status: 409, body: '"mine"' },
        reported: { message: expect.stringContaining('settleTimeout') },
        outcome: 'rolled back',
        stored: [],
        connection: 'destroyed',
      });
    },
  },

  async 'during COMMIT'() {
    const stage = await stages.open(deadlines);
    await stage.play('during COMMIT');
    stage.proxy.pause();
    await stage.ends({
      answer: { status: 500 },
      error: { code: 'ERR_COMMIT_UNKNOWN', cause: { message: expect.stringContaining('settleTimeout') } },
      outcome: 'unknown',
      stored: ['a'],
      connection: 'destroyed',
    });
  },

  async 'after COMMIT, before the response'() {
    const stage = await stages.open(deadlines);
    await stage.play('after COMMIT, before the response');
    stage.proxy.pause();
    await stage.goOn();
    // Nobody can know yet that the idle connection is dead.
    await stage.ends({ answer: ok, outcome: 'committed', stored: ['a'], connection: 'kept' });
  },

  async 'during the response'() {
    const stage = await stages.open(deadlines);
    await stage.play('during the response');
    stage.proxy.pause();
    await stage.goOn();
    await stage.ends({
      answer: { status: 201, body: 'begun, ended', complete: true },
      outcome: 'committed',
      stored: ['a'],
      connection: 'kept',
    });
  },
});
