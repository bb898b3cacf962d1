import { type Session, type WithSessionOptions, withSession } from 'express-knex-session';
import { caught, inRequest, inSession } from './support/knex';
import { failOnWarnings } from './support/warnings';
import { useBench } from './support/wire';

failOnWarnings();
const bench = useBench({ pool: { min: 0, max: 1 } });

const tenantIn = async (session: Session): Promise<string> =>
  (await session.raw("select current_setting('app.tenant', true) as tenant")).rows[0].tenant;

describe('when session.set() adds settings', () => {
  const settings = { 'app.tenant': 'option' };
  const run = (work: (session: Session) => Promise<unknown>, options: WithSessionOptions = { settings }) =>
    withSession(bench.knex, work, options);

  it('sends them with BEGIN if no statement has run, awaited or not, in place of those of the same name', async () => {
    const seen = await run(async (session) => {
      void session.set({ 'app.tenant': 'set', 'app.user': 1 });
      await session.set({ 'app.user': 2 });
      return (await session.raw("select current_setting('app.tenant') || current_setting('app.user') as seen")).rows[0].seen;
    });
    expect(seen).toBe('set2');
    expect(bench.proxy.roundTrips()).toBe(2);
  });

  it('sends them at once if one has, and before the next one that was issued, awaited or not', async () => {
    const seen = await run(async (session) => {
      const before = await tenantIn(session);
      void session.set({ 'app.tenant': 'set' });
      return [before, await tenantIn(session)];
    });
    expect(seen).toEqual(['option', 'set']);
    expect(bench.proxy.roundTrips()).toBe(4);
  });

  it('sends nothing for a session that runs no statement', async () => {
    await run((session) => session.set({ 'app.tenant': 'set' }));
    expect(bench.proxy.sql()).toEqual([]);
  });

  describe.each([
    ['a request', inRequest],
    ['withSession()', inSession],
  ])('in %s', (_where, way) => {
    it.each([
      ['before the first statement', false],
      ['after it', true],
    ])('keeps those of %s over a checkpoint', async (_when, isUsed) => {
      const seen = await way(bench.knex, async (trx) => {
        const session = trx as Session;
        if (isUsed) await session.raw('select 1');
        await session.set({ 'app.tenant': 'set' });
        const before = await tenantIn(session);
        await session.checkpoint();
        return [before, await tenantIn(session)];
      });
      expect(seen).toEqual(['set', 'set']);
    });
  });

  it('keeps those of a savepoint until it is rolled back, and those of a released one to the end, also over a checkpoint', async () => {
    const seen = await run(async (session) => {
      const seen = [];
      const inSavepoint = (value: string, end?: Error) =>
        session.transaction(async (savepoint) => {
          await (savepoint as Session).set({ 'app.tenant': value });
          seen.push(await tenantIn(savepoint as Session));
          if (end) throw end;
        });
      await caught(inSavepoint('lost', new Error('of the savepoint')));
      seen.push(await tenantIn(session));
      await inSavepoint('kept');
      seen.push(await tenantIn(session));
      await caught(inSavepoint('lost', new Error('of the savepoint')));
      await session.checkpoint();
      seen.push(await tenantIn(session));
      return seen;
    });
    expect(seen).toEqual(['lost', 'option', 'kept', 'kept', 'lost', 'kept']);
  });

  it("forgets a savepoint's over a checkpoint if the savepoint around it was rolled back", async () => {
    const seen = await run(async (session) => {
      const outer = session.transaction(async (one) => {
        await one.transaction((two) => (two as Session).set({ 'app.tenant': 'lost' }));
        throw new Error('of the savepoint');
      });
      await caught(outer);
      await session.checkpoint();
      return tenantIn(session);
    });
    expect(seen).toBe('option');
  });

  // Lost in silence, they would leave the rest of the work without row-level security.
  it('is not lost by the rollback of a savepoint that was open meanwhile: the session is rolled back', async () => {
    const work = run(async (session) => {
      const savepoint = session.transaction(async (inner) => {
        await inner.raw('select 1');
        await session.set({ 'app.tenant': 'set' });
        throw new Error('of the savepoint');
      });
      await caught(savepoint);
      await session('items').insert({ name: 'a' });
    });
    expect(await caught(work)).toMatchObject({ code: 'ERR_SAVEPOINT_OPEN' });
    expect(await bench.stored()).toEqual([]);
  });

  it('is refused after the end of the session', async () => {
    let late: Session | undefined;
    await run(async (session) => {
      late = session;
      await session.raw('select 1');
    });
    expect(await caught(late?.set({ 'app.tenant': 'late' }) as Promise<void>)).toMatchObject({ code: 'ERR_SESSION_CLOSED' });
  });
});
