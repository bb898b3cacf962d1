import { withSession } from 'express-knex-session';
import { caught, insert, Ledger, outers, UNCHANGED } from './support/knex';
import { failOnWarnings } from './support/warnings';

// A file of its own: if a test fails here, its transaction stays open and is in the way of all that comes.
failOnWarnings();
const ledger = Ledger.forTests();

describe.each(outers)('when a statement exceeds its timeout in a session made of %s', (_name, outer) => {
  it('lets the next one run', async () => {
    const knex = ledger.connect({ log: { warn() {}, error() {} } });
    await outer(knex, async (trx) => {
      const slow = withSession(trx, async (session) => {
        await insert(session, 'x');
        await session.raw('select pg_sleep(0.1)').timeout(10);
      });
      await expect(slow).rejects.toMatchObject({ name: 'KnexTimeoutError' });
      await withSession(trx, (session) => insert(session, 'y'));
    });
    expect(await ledger.names()).toEqual([...UNCHANGED, 'y']);
  }, 5_000);
});

describe.each(outers.slice(2, 4))(
  'when a statement exceeds its timeout in a session made of %s, and the connection is lost',
  (_name, outer) => {
    it('leaves no unhandled rejection behind', async () => {
      const knex = ledger.connect({ log: { warn() {}, error() {} } });
      const work = outer(knex, async (trx) => {
        const pid = (await trx.raw('select pg_backend_pid() as pid')).rows[0].pid;
        await caught(withSession(trx, (session) => session.raw('select pg_sleep(10)').timeout(10)));
        await ledger.admin.raw('select pg_terminate_backend(?)', [pid]);
        await trx('people');
      });

      await expect(work).rejects.toThrow();
      await knex.destroy();
    }, 5_000);
  },
);
