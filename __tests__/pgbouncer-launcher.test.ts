import { stat } from 'node:fs/promises';
import { describeBehindPgBouncer, type Pooler, startPooler } from './support/pgbouncer';
import { eventually } from './support/pool';

describeBehindPgBouncer('a PgBouncer of our own', () => {
  let pooler: Pooler;
  beforeEach(async () => {
    pooler = await startPooler();
  });
  afterEach(() => pooler.stop());

  it('runs, and ends when it is stopped; that is safe to do twice', async () => {
    expect(pooler.isAlive()).toBe(true);
    expect(pooler.version).toMatch(/^1\.\d+/);
    await pooler.stop();
    expect(pooler.isAlive()).toBe(false);
    await pooler.stop();
  });

  it('never outlives its parent, killed or not', async () => {
    await pooler.killParent();
    await eventually(() => expect(pooler.isAlive()).toBe(false));
  });

  const itOnLinux = process.platform === 'linux' ? it : it.skip;
  itOnLinux('never runs as root', async () => {
    expect((await stat(`/proc/${pooler.pid}`)).uid).not.toBe(0);
  });
});
