import { type Handler, insert } from './support/ledger';
import { describeFault } from './support/matrix';
import { type Ending, ok, type Stage, useStages } from './support/matrix-stage';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const stages = useStages();

const rolledBack = { answer: { status: 500 }, outcome: 'rolled back', stored: [], connection: 'kept' } satisfies Ending;
const committed = { answer: ok, outcome: 'committed', stored: ['a'], connection: 'kept' } satisfies Ending;
const never: Handler = () => new Promise(() => {});

const mine = new Error('mine');
const fail: Handler = () => {
  throw mine;
};
/** The very object, and not only one of this message. */
async function keepsMine(stage: Stage, ending: Ending): Promise<void> {
  await stage.ends({ ...ending, error: { message: 'mine' } });
  expect(stage.errors[0]).toBe(mine);
}

/** Issues a statement that takes a moment, without awaiting it, and waits until it is on its way to the server. */
async function startSlow(stage: Stage, sql = 'SELECT pg_sleep(0.02)'): Promise<{ result: Promise<unknown> }> {
  const sent = deferred();
  stage.proxy.onFrontend(({ text }) => {
    if (text === sql) sent.resolve();
  });
  const result = stage.session.raw(sql).then(
    () => 'done',
    (error: unknown) => error,
  );
  await sent.promise;
  return { result };
}

describeFault('handler throws', {
  async 'before BEGIN'() {
    const stage = await stages.open();
    await stage.send(fail);
    await keepsMine(stage, { ...rolledBack, outcome: 'unused', connection: 'none' });
  },

  'during a statement': {
    async 'that ends soon'() {
      const stage = await stages.open();
      let slow: { result: Promise<unknown> } | undefined;
      await stage.send(async (req, ...others) => {
        await insert(req, 'a');
        slow = await startSlow(stage);
        return fail(req, ...others);
      });
      await keepsMine(stage, rolledBack);
      expect(await slow?.result).toBe('done');
    },
    async 'that does not: it is cancelled'() {
      const stage = await stages.open();
      let slow: { result: Promise<unknown> } | undefined;
      await stage.lock.hold();
      await stage.send(async (req, ...others) => {
        await insert(req, 'a');
        slow = await startSlow(stage, stage.lock.statement);
        return fail(req, ...others);
      });
      await keepsMine(stage, rolledBack);
      expect(stage.cancels).toBeGreaterThan(0);
      expect(await slow?.result).toBeInstanceOf(Error);
    },
  },

  async 'between statements'() {
    const stage = await stages.open();
    await stage.play('between statements', fail);
    await stage.goOn();
    await keepsMine(stage, rolledBack);
  },

  async 'during COMMIT'() {
    const stage = await stages.open();
    const thrown = deferred();
    await stage.play('during COMMIT', (...args) => {
      thrown.resolve();
      return fail(...args);
    });
    await thrown.promise;
    await stage.goOn();
    await keepsMine(stage, committed);
  },

  async 'after COMMIT, before the response'() {
    const stage = await stages.open();
    await stage.play('after COMMIT, before the response', fail);
    await eventually(() => expect(stage.errors).toHaveLength(1));
    await stage.goOn();
    // Express ends the connection of who throws behind a head: the client hears nothing, and nothing wrong.
    await keepsMine(stage, { ...committed, answer: { status: 0, complete: false } });
  },

  async 'during the response'() {
    const stage = await stages.open();
    await stage.play('during the response', fail);
    await stage.goOn();
    await keepsMine(stage, { ...committed, answer: { status: 201, body: 'begun, ', complete: false } });
  },
});

const timedOut = { answer: { status: 503 }, error: { code: 'ERR_SESSION_TIMEOUT' } };

describeFault('handler hangs', {
  async 'before BEGIN'() {
    const stage = await stages.open({ isRaw: true, transactionTimeout: 50 });
    await stage.send(never);
    await eventually(() => expect(stage.response).toBeDefined());
    await stage.client.reset();
    await eventually(() => expect(stage.response.destroyed).toBe(true));
    await stage.ends({ outcome: 'unused', stored: [], connection: 'none' });
    expect(stage.acquired).toBe(1);
  },

  async 'during a statement'() {
    const stage = await stages.open({ transactionTimeout: 300 });
    await stage.play('during a statement');
    const { signal } = stage.session;
    await stage.ends({ ...rolledBack, ...timedOut });
    expect(stage.cancels).toBeGreaterThan(0);
    expect(stage.proxy.sql()).toContain('ROLLBACK');
    expect(signal.reason).toBe(stage.errors[0]);
    expect(signal.reason).toBe(stage.thrown);
    expect(stage.thrown).toMatchObject({ cause: { code: '57014' } });
  },

  async 'between statements'() {
    const stage = await stages.open({ transactionTimeout: 150 });
    await stage.play('between statements', never);
    const { signal } = stage.session;
    await stage.ends({ ...rolledBack, ...timedOut });
    expect(stage.cancels).toBe(0);
    expect(signal.reason).toBe(stage.errors[0]);
    expect((await stage.answer)?.headers.connection).toBe('close');
  },

  async 'during COMMIT'() {
    const stage = await stages.open({ settleTimeout: 150 });
    await stage.play('during COMMIT', never);
    await stage.ends({
      answer: { status: 500 },
      error: { code: 'ERR_COMMIT_UNKNOWN', cause: { message: expect.stringContaining('settleTimeout') } },
      outcome: 'unknown',
      // The server was still at work on it, and has done it in the end.
      stored: ['a'],
      connection: 'destroyed',
    });
  },
});

const refusal = { code: 'ERR_SESSION_CLOSED' };

/** Brings a request to a moment where a statement comes too late. */
async function refuses(moment: 'during COMMIT' | 'after COMMIT, before the response' | 'during the response', ending: Ending) {
  const stage = await stages.open();
  const refused = deferred<unknown>();
  await stage.play(moment, async (req, res) => {
    await insert(req, 'b').then(refused.resolve, refused.resolve);
    if (!res.writableEnded) res.end('ended');
  });
  // Before it goes on, at the latest: nobody shall wait for the end to hear of it.
  if (moment !== 'during the response') expect(await refused.promise).toMatchObject(refusal);
  await stage.goOn();
  expect(await refused.promise).toMatchObject(refusal);
  await stage.ends(ending);
}

describeFault('statement not awaited', {
  async 'before BEGIN'() {
    const stage = await stages.open();
    await stage.send((req, res) => {
      insert(req, 'a').catch(() => {});
      res.status(201).json('ok');
    });
    await stage.ends(committed);
  },

  async 'during a statement'() {
    const stage = await stages.open();
    await stage.send(async (req, res) => {
      await insert(req, 'a');
      await startSlow(stage);
      insert(req, 'b').catch(() => {});
      res.status(201).json('ok');
    });
    await stage.ends({ ...committed, stored: ['a', 'b'] });
  },

  async 'between statements'() {
    const stage = await stages.open();
    await stage.send(async (req, res) => {
      await insert(req, 'a');
      insert(req, 'b').catch(() => {});
      await insert(req, 'c');
      // In this turn of the event loop, but later than the response's end.
      void Promise.resolve().then(() => insert(req, 'd'));
      res.status(201).json('ok');
    });
    await stage.ends({ ...committed, stored: ['a', 'b', 'c', 'd'] });
  },

  'during COMMIT': () => refuses('during COMMIT', committed),
  'after COMMIT, before the response': () => refuses('after COMMIT, before the response', committed),
  'during the response': () =>
    refuses('during the response', { ...committed, answer: { status: 201, body: 'begun, ended', complete: true } }),
});
