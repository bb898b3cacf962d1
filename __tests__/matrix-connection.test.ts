import { describeFault } from './support/matrix';
import { type Ending, ok, type Stage, useStages } from './support/matrix-stage';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const stages = useStages();

/** The second one is what pg makes of it before 8.23. */
const RESET = { message: expect.stringMatching(/ECONNRESET|Connection terminated/) };

const kinds: { name: string; lose: (stage: Stage) => Promise<void>; error: object }[] = [
  { name: 'killed', lose: (stage) => stage.kill(), error: { code: '57P01' } },
  { name: 'reset', lose: (stage) => stage.reset(), error: RESET },
];

/** The test of a cell, for each kind of loss. */
function cell(test: (stage: Stage, lose: () => Promise<void>, error: object) => Promise<void>, suffix = '') {
  const cellOf = ({ name, lose, error }: (typeof kinds)[number]) => {
    const run = async () => {
      const stage = await stages.open();
      await test(stage, () => lose(stage), error);
    };
    return [`${name}${suffix}`, run];
  };
  return Object.fromEntries(kinds.map(cellOf));
}

const nothingStored = { outcome: 'rolled back', stored: [], connection: 'destroyed' } satisfies Ending;

describeFault('backend killed, connection reset', {
  'before BEGIN': cell(async (stage, lose, cause) => {
    await stage.play('before BEGIN');
    await lose();
    await stage.goOn();
    await stage.ends({ ...nothingStored, answer: { status: 503 }, error: { code: 'ERR_SESSION_UNAVAILABLE', cause }, outcome: 'unused' });
  }),

  'during a statement': cell(async (stage, lose, error) => {
    await stage.play('during a statement');
    await lose();
    await stage.ends({ ...nothingStored, answer: { status: 500 }, error });
  }),

  'between statements': {
    ...cell(async (stage, lose, error) => {
      await stage.play('between statements');
      await lose();
      await stage.goOn();
      await stage.ends({ ...nothingStored, answer: { status: 500 }, error });
    }, ', a statement comes next'),
    ...cell(async (stage, lose, error) => {
      await stage.play('between statements', (_req, res) => res.status(201).json('ok'));
      await lose();
      await stage.goOn();
      await stage.ends({ ...nothingStored, answer: { status: 500 }, error });
    }, ', COMMIT comes next'),
  },

  'during COMMIT': cell(async (stage, lose, cause) => {
    await stage.play('during COMMIT');
    await lose();
    await stage.ends({
      answer: { status: 500 },
      error: { code: 'ERR_COMMIT_UNKNOWN', cause },
      outcome: 'unknown',
      // A backend that has only lost its client goes on, and commits: that is why it is unknown.
      stored: cause === RESET ? ['a'] : [],
      connection: 'destroyed',
    });
  }),

  'after COMMIT, before the response': cell(async (stage, lose) => {
    await stage.play('after COMMIT, before the response');
    await lose();
    await stage.goOn();
    await stage.ends({ answer: ok, outcome: 'committed', stored: ['a'], connection: 'destroyed' });
  }),

  'during the response': cell(async (stage, lose) => {
    await stage.play('during the response');
    await lose();
    await stage.goOn();
    await stage.ends({
      answer: { status: 201, body: 'begun, ended', complete: true },
      outcome: 'committed',
      stored: ['a'],
      connection: 'destroyed',
    });
  }),
});
