import { setTimeout as delay } from 'node:timers/promises';
import { TransferLoad } from './support/example-app-load';
import { OwnPostgres } from './support/example-app-postgres';
import { ExampleStage } from './support/example-app-stage';
import { post } from './support/http';
import { eventually } from './support/pool';

const CLIENTS = 32;
const POOL_SIZE = 5;
const ended = { code: 0, isInTime: true };
const nothingWrong = { lost: [], lies: [], torn: [] };
const nothingDoubtful = { ...nothingWrong, doubtful: [] };

describe('when SIGTERM comes under load', () => {
  concurrently('keeps what is acknowledged, and nothing of what is refused', async ({ stage, load, app }) => {
    await stage.fillLongAccount();
    load.start(CLIENTS);
    await load.until(100, 'stored');
    // With both downloads, they take all connections but one.
    const slow = await stage.holdIds(1);
    const hung = await stage.holdIds(1);
    const slowAnswers = slow.ids.map((id) => load.send({ id }));
    const hungAnswers = hung.ids.map((id) => load.send({ id }));
    await eventually(async () => expect(await stage.backends("wait_event_type = 'Lock' and query like '%insert%'")).toHaveLength(2));
    const goingOn = await stage.download();
    const stuck = await stage.download();

    const stop = stage.stop('SIGTERM');
    await app.says('Finishing the requests in flight');
    const stoppingSince = performance.now();
    await slow.release();
    const text = await goingOn.read();

    expect((await Promise.all(slowAnswers)).map(({ fate }) => fate)).toEqual(['stored']);
    expect(text.trimEnd().split('\n')).toHaveLength(1 + stage.entryCount);
    for (const { answer } of await Promise.all(hungAnswers)) {
      expect(answer).toMatchObject({ status: 503, complete: true, headers: { 'retry-after': '1' } });
    }
    expect(await stop).toEqual(ended);
    await expect(stuck.read()).rejects.toThrow('aborted');
    await hung.release();
    await load.ended();

    expect(await load.compareWith(stage.admin)).toEqual(nothingDoubtful);
    for (const { answer, fate } of load.sent.filter(({ sentAt }) => sentAt > stoppingSince)) {
      // No new connection, and on an open one: not again.
      if (fate === 'refused') expect(answer).toMatchObject({ status: 503, headers: { connection: 'close' } });
      else expect(['unheard', 'unanswered']).toContain(fate);
    }
    await stage.noBackends();
    expect(app.errors()).toBe('');
  });
});

// Tests of one block run side by side: these wait for deadlines most of their time.
describe('when SIGTERM comes', () => {
  concurrently('a second time: stops at once, and what is acknowledged is there', async ({ stage, load, app }) => {
    const hung = await stage.holdIds(3);
    for (const id of hung.ids) void load.send({ id });
    load.start(CLIENTS);
    await load.until(50, 'stored');

    void stage.stop('SIGTERM');
    await app.says('Finishing the requests in flight');
    await delay(600); // Sooner, it is the same press: see server.ts.
    expect(await stage.stop('SIGTERM')).toEqual({ code: 143, isInTime: true });
    await hung.release();
    await load.ended();

    await stage.noBackends();
    const { doubtful, ...others } = await load.compareWith(stage.admin);
    expect(others).toEqual(nothingWrong);
    expect(doubtful.length).toBeLessThanOrEqual(POOL_SIZE); // Their COMMIT was in flight.
    expect(app.errors()).toBe('');
  });

  async function fill({ stage, load, app }: Scene) {
    const hold = await stage.holdIds(POOL_SIZE);
    const answers = hold.ids.map((id) => load.send({ id }));
    await eventually(async () => expect(await stage.sessions()).toMatchObject({ open: POOL_SIZE, waiting: 0 }));
    for (let i = 0; i < 8; i++) answers.push(load.send());
    await eventually(async () => expect(await stage.sessions()).toMatchObject({ open: POOL_SIZE, waiting: 8 }));
    const stop = stage.stop('SIGTERM');
    await app.says('Finishing the requests in flight');
    return { hold, answers, stop };
  }

  concurrently('while the pool is full: serves those that wait for a connection, too', async (scene) => {
    const { hold, answers, stop } = await fill(scene);

    await hold.release();

    expect((await Promise.all(answers)).map(({ fate }) => fate)).toEqual(Array(POOL_SIZE + 8).fill('stored'));
    expect(await stop).toEqual(ended);
    expect(await scene.load.compareWith(scene.stage.admin)).toEqual(nothingDoubtful);
  });

  concurrently('while the pool is full, and stays so: refuses all in time', async (scene) => {
    const { hold, answers, stop } = await fill(scene);

    expect(await stop).toEqual(ended);

    expect((await Promise.all(answers)).map(({ answer }) => answer.status)).toEqual(Array(POOL_SIZE + 8).fill(503));
    await scene.stage.noBackends();
    await hold.release();
    expect(await scene.load.compareWith(scene.stage.admin)).toEqual(nothingDoubtful);
    expect(scene.app.errors()).toBe('');
    expect(scene.app.output()).toContain(`Refused or gave up ${POOL_SIZE + 8} requests. Nothing of them is stored.`);
  });

  concurrently('while a COMMIT hangs: says that its outcome is unknown, and ends in time', async ({ stage, load }) => {
    const hold = await stage.holdAccount();
    const answer = load.send({ from: hold.ids[0] ?? '' });
    await eventually(async () => expect(await stage.backends("wait_event_type = 'Lock' and query ilike 'commit%'")).toHaveLength(1));

    expect(await stage.stop('SIGTERM')).toEqual(ended);

    expect((await answer).fate).toBe('unknown');
    await hold.release();
    await stage.noBackends();
    expect(await load.compareWith(stage.admin)).toMatchObject(nothingWrong);
  });

  concurrently(
    'behind a dead network: ends in time, and answers every request',
    async ({ stage, load }) => {
      load.start(CLIENTS);
      await load.until(50, 'stored');
      stage.proxy?.pause();
      await eventually(async () => expect(await stage.sessions()).toMatchObject({ open: POOL_SIZE, waiting: CLIENTS - POOL_SIZE }));

      expect(await stage.stop('SIGTERM')).toEqual(ended);

      await load.ended();
      await stage.proxy?.close();
      await stage.noBackends();
      expect(await load.compareWith(stage.admin)).toMatchObject(nothingWrong);
      expect(load.with('unanswered')).toEqual([]);
    },
    { isBehindProxy: true },
  );

  it.concurrent('after a crash of its own PostgreSQL: ends in time, and the next start finds what is acknowledged', async () => {
    const own = await OwnPostgres.inNewFolder();
    try {
      const app = own.start();
      const load = new TransferLoad(await app.url(), await createAccounts(await app.url()));
      load.start(CLIENTS);
      await load.until(50, 'stored');
      await own.crash();
      await load.until(CLIENTS, 'refused');

      app.signal('SIGTERM');
      expect(await app.exit).toBe(0);
      await load.ended();

      await own.start().url();
      await own.withAdmin(async (admin) => expect(await load.compareWith(admin)).toMatchObject(nothingWrong));
    } finally {
      await own.remove();
    }
  }, 60_000);
});

async function createAccounts(url: string): Promise<TransferLoad['accounts']> {
  const create = async (kind: string): Promise<string> => JSON.parse((await post(`${url}/accounts`, { name: 'Test', kind })).body).id;
  return { external: [await create('external'), await create('external'), await create('external')], poor: await create('customer') };
}

interface Scene {
  stage: ExampleStage;
  load: ExampleStage['load'];
  app: ExampleStage['app'];
}

function concurrently(promise: string, run: (scene: Scene) => Promise<void>, options?: { isBehindProxy: boolean }): void {
  it.concurrent(promise, async () => {
    const stage = await ExampleStage.open(options);
    try {
      await run({ stage, load: stage.load, app: stage.app });
    } finally {
      await stage.close();
    }
  }, 60_000);
}
