import { deferred } from './support/gated-app';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { useBench } from './support/wire';

failOnWarnings();

describe("when Knex's own .timeout(ms, { cancel: true }) passes after its statement was interrupted, while ROLLBACK is in flight", () => {
  const bench = useBench({ pool: { min: 0, max: 1 } }, { transactionTimeout: 50 });

  it('cancels nothing: the next borrower of the connection would be hit (hazard 13)', async () => {
    const rollback = deferred();
    const cancels: string[] = [];
    let isRollingBack = false;
    bench.proxy.onFrontend(({ type, text }) => {
      if (type === 'CancelRequest') cancels.push(isRollingBack ? 'late' : 'in time');
      if (text !== 'ROLLBACK') return undefined;
      isRollingBack = true;
      return rollback.promise;
    });
    const knexTimeout = 250;
    const begun = performance.now();
    const answer = bench.answer(async (req, res) => {
      await req.session.raw('select pg_sleep(10)').timeout(knexTimeout, { cancel: true });
      res.end();
    });
    await eventually(() => expect(isRollingBack).toBe(true));
    // Its timer runs in this process: when one that was set after it has passed, it has.
    await new Promise((resolve) => setTimeout(resolve, knexTimeout - (performance.now() - begun) + 30));
    rollback.resolve();
    expect(await answer).toMatchObject({ status: 503 });
    expect(cancels).not.toContain('late');
    expect(cancels).toContain('in time');
  });
});
