import { once } from 'node:events';
import { inSession, Ledger, plainly } from './support/knex';
const ledger = Ledger.forTests();
const MANY = 'select i from generate_series(1, 1000) i';
it.each(Object.entries({ plainly, inSession }))('%s', async (_n, way) => {
  await way(ledger.knex, async (trx) => {
      const stream = trx.raw(MANY).stream();
      stream.destroy();
      await once(stream, 'close');
      return trx('people').insert({ name: 'x' });
  });
}, 3000);
