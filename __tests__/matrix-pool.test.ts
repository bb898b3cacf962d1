import { type Handler, insert } from './support/ledger';
import { describeFault } from './support/matrix';
import { type Ending, type Stage, type StageOptions, useStages } from './support/matrix-stage';
import { failOnWarnings } from './support/warnings';
import { isSql, spoil } from './support/wire';

failOnWarnings();
const stages = useStages();

const insertA: Handler = async (req) => {
  await insert(req, 'a');
};

describeFault('pool exhausted', {
  async 'before BEGIN'() {
    const stage = await stages.open({ acquireTimeout: 100 });
    const taken = await stage.knex.client.acquireConnection();
    await stage.send(insertA);
    expect(await stage.answer).toMatchObject({ status: 503 });
    // It comes too late, and is given back at once.
    await stage.knex.client.releaseConnection(taken);
    await stage.isFree();
    await stage.ends({
      answer: { status: 503 },
      error: { code: 'ERR_SESSION_UNAVAILABLE', cause: { message: expect.stringContaining('acquireTimeout') } },
      outcome: 'unused',
      stored: [],
      connection: 'kept',
    });
    // That of the next request.
    expect(stage.proxy.sql().filter((sql) => sql === 'BEGIN;')).toHaveLength(1);
  },
});

/** What may happen to a ROLLBACK. */
const failures: { name: string; disturb: (stage: Stage) => void; options?: StageOptions; reported: object }[] = [
  {
    name: 'the connection is cut',
    disturb: ({ proxy }) => proxy.onFrontend((message) => (isSql(message, 'ROLLBACK') ? 'cut-before' : undefined)),
    reported: { message: expect.stringContaining('Connection terminated') },
  },
  {
    name: 'the server refuses it',
    disturb: ({ proxy }) =>
      proxy.onFrontend((message) => {
        if (isSql(message, 'ROLLBACK')) spoil(message);
      }),
    reported: { code: '42601' },
  },
  {
    name: 'no answer comes',
    disturb: ({ proxy }) =>
      proxy.onFrontend((message) => {
        if (isSql(message, 'ROLLBACK')) proxy.pause();
      }),
    options: { settleTimeout: 150 },
    reported: { message: expect.stringContaining('settleTimeout') },
  },
];

function whenRollbackFails(handler: Handler, error: object) {
  const cellOf = ({ name, disturb, options, reported }: (typeof failures)[number]): [string, () => Promise<void>] => {
    const run = async () => {
      const stage = await stages.open(options);
      disturb(stage);
      await stage.send(handler);
      const ending: Ending = { answer: { status: 500 }, error, reported, outcome: 'rolled back', stored: [], connection: 'destroyed' };
      await stage.ends(ending);
    };
    return [name, run];
  };
  return Object.fromEntries(failures.map(cellOf));
}

describeFault('ROLLBACK fails', {
  'during a statement': whenRollbackFails(
    async (req) => {
      await insert(req, 'a');
      await insert(req, 'a');
    },
    { code: '23505' },
  ),
  'between statements': whenRollbackFails(
    async (req) => {
      await insert(req, 'a');
      throw new Error('mine');
    },
    { message: 'mine' },
  ),
});
