import { describeFault } from './support/matrix';
import { useRestartableServer } from './support/matrix-postgres';
import { type Ending, ok, type Stage, useStages } from './support/matrix-stage';
import { failOnWarnings } from './support/warnings';
import { ended } from './support/wire';

failOnWarnings();
const server = useRestartableServer();
const stages = useStages();
beforeAll(() => {
  // It loses its connections too, and Knex would print that.
  stages.ledger.database.admin.client.logger.warn = () => {};
});
afterAll(() => server.stop());

/** Brings a request to a moment, restarts the server, and lets it go on. */
async function restartAt(stage: Stage, ...moment: Parameters<Stage['play']>): Promise<void> {
  await stage.play(...moment);
  const known = ended(stage.taken as NonNullable<Stage['taken']>);
  await server.restart();
  await known;
  await stage.goOn();
}

const terminated = { message: expect.stringContaining('Connection terminated') };
const lost = { answer: { status: 500 }, outcome: 'rolled back', stored: [], connection: 'destroyed' } satisfies Ending;
const committed = { answer: ok, outcome: 'committed', stored: ['a'], connection: 'destroyed' } satisfies Ending;

describeFault('server restart', {
  async 'before BEGIN'() {
    const stage = await stages.open();
    await restartAt(stage, 'before BEGIN');
    await stage.ends({
      ...lost,
      answer: { status: 503 },
      error: { code: 'ERR_SESSION_UNAVAILABLE', cause: expect.any(Error) },
      outcome: 'unused',
    });
  },

  async 'during a statement'() {
    const stage = await stages.open();
    await restartAt(stage, 'during a statement');
    await stage.ends({ ...lost, error: terminated });
  },

  'between statements': {
    async 'a statement comes next'() {
      const stage = await stages.open();
      await restartAt(stage, 'between statements');
      await stage.ends({ ...lost, error: terminated });
    },
    async 'COMMIT comes next'() {
      const stage = await stages.open();
      await restartAt(stage, 'between statements', (_req, res) => res.status(201).json('ok'));
      await stage.ends({ ...lost, error: terminated });
    },
  },

  async 'during COMMIT'() {
    const stage = await stages.open();
    await restartAt(stage, 'during COMMIT');
    await stage.ends({ ...lost, error: { code: 'ERR_COMMIT_UNKNOWN', cause: expect.any(Error) }, outcome: 'unknown' });
  },

  async 'after COMMIT, before the response'() {
    const stage = await stages.open();
    await restartAt(stage, 'after COMMIT, before the response');
    await stage.ends(committed);
  },

  async 'during the response'() {
    const stage = await stages.open();
    await restartAt(stage, 'during the response');
    await stage.ends({ ...committed, answer: { status: 201, body: 'begun, ended', complete: true } });
  },
});
