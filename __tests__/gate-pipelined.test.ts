import { deferred } from './support/gated-app';
import { RawClient } from './support/http';
import { failOnWarnings } from './support/warnings';
import { useBench } from './support/wire';

failOnWarnings();

describe('when a pipelined response fails after it has begun, and the one before it is still to come', () => {
  const bench = useBench({ pool: { min: 0, max: 2 } }, { commitAt: 'end' });

  it('lets that one arrive whole, and cuts the connection only then', async () => {
    const hasFailed = deferred();
    const earlier = new URL(
      bench.route(async (_req, res) => {
        await hasFailed.promise;
        res.send('the whole of it');
      }),
    );
    const later = new URL(
      bench.route(async (req, res) => {
        await req.session('items').insert({ name: 'a' });
        res.write('half of it');
        // Express's final handler, which ends the connection, has its turn later still.
        bench.onErrorHandler = () => setTimeout(hasFailed.resolve, 50);
        throw new Error('a failure in the middle');
      }),
    );
    const client = (await RawClient.connect(Number(earlier.port))).get(earlier.pathname).get(later.pathname);
    await client.closed;
    expect(client.received).toContain('the whole of it');
    expect(client.received).not.toContain('half of it');
    expect(await bench.stored()).toEqual([]);
  });
});
