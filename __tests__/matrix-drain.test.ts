import { setTimeout as delay } from 'node:timers/promises';
import { type Handler, insert } from './support/ledger';
import { describeFault } from './support/matrix';
import { type Ending, ok, useStages } from './support/matrix-stage';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const stages = useStages();

const insertA: Handler = async (req) => {
  await insert(req, 'a');
};

const never: Handler = () => new Promise(() => {});
const refused = { answer: { status: 503 }, error: { code: 'ERR_SESSION_UNAVAILABLE' }, stored: [] };
const committed = { answer: ok, outcome: 'committed', stored: ['a'], connection: 'kept' } satisfies Ending;

describeFault('drain / shutdown', {
  'before BEGIN': {
    async 'after it'() {
      const stage = await stages.open();
      await stage.middleware.drain(1_000);
      await stage.send(insertA);
      await stage.ends({ ...refused, outcome: 'unused', connection: 'none' });
    },
    async 'while a connection is waited for'() {
      const stage = await stages.open();
      const taken = await stage.knex.client.acquireConnection();
      await stage.send(insertA);
      await stage.middleware.drain(50);
      expect(await stage.answer).toMatchObject({ status: 503 });
      await stage.knex.client.releaseConnection(taken);
      await stage.ends({ ...refused, outcome: 'unused', connection: 'kept' });
    },
  },

  'during a statement': {
    async ''() {
      const stage = await stages.open();
      await stage.play('during a statement');
      await stage.middleware.drain(50);
      expect(stage.cancels).toBeGreaterThan(0);
      await stage.ends({ ...refused, outcome: 'rolled back', connection: 'destroyed' });
    },
    async 'on a dead network'() {
      const stage = await stages.open({ settleTimeout: 150 });
      await stage.play('during a statement');
      stage.proxy.pause();
      await stage.middleware.drain(50);
      const reported = { message: expect.stringContaining('settleTimeout') };
      await stage.ends({ ...refused, reported, outcome: 'rolled back', connection: 'destroyed' });
    },
  },

  async 'between statements'() {
    const stage = await stages.open();
    await stage.play('between statements', never);
    await stage.middleware.drain(50);
    await stage.ends({ ...refused, outcome: 'rolled back', connection: 'destroyed' });
  },

  async 'during COMMIT'() {
    const stage = await stages.open();
    await stage.play('during COMMIT');
    const drained = stage.middleware.drain(10).then(() => 'drained');
    // The passing of its deadline is no event.
    expect(await Promise.race([drained, delay(40, 'waiting')])).toBe('waiting');
    await stage.goOn();
    expect(await drained).toBe('drained');
    await stage.ends(committed);
    expect(stage.cancels).toBe(0);
  },

  async 'after COMMIT, before the response'() {
    const stage = await stages.open();
    await stage.play('after COMMIT, before the response');
    await stage.middleware.drain(1_000);
    await stage.goOn();
    await stage.ends(committed);
  },

  async 'during the response'() {
    const stage = await stages.open();
    await stage.play('during the response');
    await stage.middleware.drain(1_000);
    await stage.goOn();
    await stage.ends({ ...committed, answer: { status: 201, body: 'begun, ended', complete: true } });
  },
});
