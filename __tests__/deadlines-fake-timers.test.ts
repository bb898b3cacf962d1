import { setTimeout as sleep } from 'node:timers/promises';
import { withSession } from 'express-knex-session';
import { useBench } from './support/wire';

describe('when a test fakes the clock', () => {
  const bench = useBench();
  afterEach(() => void jest.useRealTimers());

  it('ends a transaction when its time has passed, by the real one', async () => {
    jest.useFakeTimers();
    const work = withSession(
      bench.knex,
      async (session) => {
        await session.raw('select 1');
        await new Promise((resolve) => session.signal.addEventListener('abort', resolve));
      },
      { transactionTimeout: 100 },
    );
    await expect(work).rejects.toMatchObject({ code: 'ERR_SESSION_TIMEOUT' });
  });

  it('ends none because the faked one is moved on, even if it was loaded under that', async () => {
    jest.useFakeTimers({ doNotFake: ['nextTick', 'setImmediate', 'queueMicrotask'] });
    await jest.isolateModulesAsync(async () => {
      const loaded = (await import('express-knex-session')).withSession;
      await loaded(bench.knex, async (session) => {
        await session.raw('select 1');
        jest.advanceTimersByTime(60_000);
        await sleep(200);
        await session.raw('select 1');
      });
    });
  });
});
