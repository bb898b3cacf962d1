import { type SessionMessage, sessionChannels, withSession } from 'express-knex-session';
import { get } from './support/http';
import { flavours, useLedger } from './support/ledger';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const ledger = useLedger();

const ways: [string, (message: SessionMessage) => unknown][] = [
  ['answers the request', ({ request }) => request?.res?.status(503).end()],
  ['rolls back', ({ session }) => session.rollback(new Error('too many')).catch(() => {})],
  ['commits', ({ session }) => session.commit().catch(() => {})],
];

/* What sheds load, by how many wait. */
describe.each(flavours)('on $version, when a listener on acquire', (flavour) => {
  describe.each(ways)('%s', (_, end) => {
    it.each(['free', 'busy'])('the connection is given back (pool: %s)', async (pool) => {
      const knex = ledger.pool({ pool: { min: 0, max: 1 } });
      const mayEnd = deferred();
      const holder = withSession(knex, async (session) => {
        await session.raw('SELECT 1');
        if (pool === 'busy') await mayEnd.promise;
      });
      await (pool === 'busy' ? eventually(() => expect(poolUsage(knex).used).toBe(1)) : holder);
      const { url } = await ledger.serving(flavour)(
        async (req, res) => {
          await req.session.raw('SELECT 1');
          res.sendStatus(200);
        },
        { knex, onError() {} },
      );
      sessionChannels.acquire.subscribe(end);
      try {
        const answer = get(url);
        setTimeout(mayEnd.resolve, 30);
        expect((await answer).complete).toBe(true);
      } finally {
        sessionChannels.acquire.unsubscribe(end);
      }
      await holder;
      await ledger.isClean(knex);
    });
  });
});
