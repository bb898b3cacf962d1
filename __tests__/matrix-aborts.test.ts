import type { RawClient } from './support/http';
import { waysToLeave } from './support/leaving';
import { type Handler, insert } from './support/ledger';
import { describeFault } from './support/matrix';
import { type Ending, type Stage, useStages } from './support/matrix-stage';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const stages = useStages();

const insertA: Handler = async (req) => {
  await insert(req, 'a');
};

/** The test of a cell, for each way in which a client may leave. */
function cell(test: (stage: Stage, leave: () => Promise<void>) => Promise<void>) {
  const cellOf = ([name, leave]: [string, (client: RawClient) => Promise<unknown>]): [string, () => Promise<void>] => {
    const run = async () => {
      const stage = await stages.open({ isRaw: true });
      const leaveAndBeMissed = async () => {
        await leave(stage.client);
        await eventually(() => expect(stage.response.destroyed).toBe(true));
      };
      await test(stage, leaveAndBeMissed);
    };
    return [name, run];
  };
  return Object.fromEntries(waysToLeave.map(cellOf));
}

const rolledBack = { outcome: 'rolled back', stored: [], connection: 'kept' } satisfies Ending;
const committed = { outcome: 'committed', stored: ['a'], connection: 'kept' } satisfies Ending;
const gone = { code: 'ERR_SESSION_CLOSED', message: expect.stringContaining('client has disconnected') };

describeFault('client aborts', {
  'before BEGIN': cell(async (stage, leave) => {
    const taken = await stage.knex.client.acquireConnection();
    await stage.send(insertA);
    await eventually(() => expect(poolUsage(stage.knex).pendingAcquires).toBe(1));
    await leave();
    // It gives up at once, and not when its turn comes.
    await eventually(() => expect(stage.errors).toHaveLength(1));
    await stage.knex.client.releaseConnection(taken);
    await stage.ends({ ...rolledBack, error: gone, outcome: 'unused' });
    expect(stage.proxy.sql().filter((sql) => /^insert/.test(sql))).toHaveLength(1);
  }),

  'during a statement': {
    ...cell(async (stage, leave) => {
      await stage.play('during a statement');
      const { signal } = stage.session;
      await leave();
      await stage.isFree();
      expect(stage.cancels).toBeGreaterThan(0);
      await stage.ends({ ...rolledBack, error: { ...gone, cause: { code: '57014' } } });
      expect(signal.reason).toBe(stage.thrown);
      expect(signal.reason).toBe(stage.errors[0]);
      expect(stage.proxy.sql()).toContain('ROLLBACK');
    }),
    async 'RST, on a dead network'() {
      const stage = await stages.open({ isRaw: true, settleTimeout: 150 });
      await stage.play('during a statement');
      stage.proxy.pause();
      await stage.client.reset();
      await stage.isFree();
      const reported = { message: expect.stringContaining('settleTimeout') };
      await stage.ends({ ...rolledBack, error: gone, reported, connection: 'destroyed' });
    },
  },

  'between statements': cell(async (stage, leave) => {
    await stage.play('between statements');
    await leave();
    await stage.isFree();
    expect(stage.session.signal.reason).toMatchObject(gone);
    await stage.goOn();
    await stage.ends({ ...rolledBack, error: gone });
    expect(stage.cancels).toBe(0);
  }),

  'during COMMIT': cell(async (stage, leave) => {
    await stage.play('during COMMIT');
    await leave();
    await stage.goOn();
    await stage.ends(committed);
    expect(stage.cancels).toBe(0);
  }),

  'after COMMIT, before the response': cell(async (stage, leave) => {
    await stage.play('after COMMIT, before the response');
    await leave();
    await stage.goOn();
    await stage.ends(committed);
  }),

  'during the response': cell(async (stage, leave) => {
    await stage.play('during the response');
    await leave();
    await stage.goOn();
    await stage.ends(committed);
  }),
});
