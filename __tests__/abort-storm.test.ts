import { EventEmitter, once } from 'node:events';
import { clientHasGone, pidOf, used, Victim } from './support/abort';
import { get, RawClient } from './support/http';
import { express5Flavour, type Handler, insert, useLedger } from './support/ledger';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger(4);

const LEAVING = 150;
/** One that is always cancelled, and others that may end while their cancel is on its way. */
const sleeps = [4, 7, 10, 20, 30_000].map((ms) => `SELECT pg_sleep(${ms / 1000})`);

// Hazard 13: a cancel that comes late hits the next borrower of the connection.
describe(`when ${LEAVING} clients leave around the end of their statements, on a pool that others use`, () => {
  it.each(['in the first statement', 'in a later one'])(
    '%s: none of the others is cancelled, and nothing of those who left is stored',
    async (place) => {
      const failed: unknown[] = [];
      let cancelled = 0;
      const begun = new EventEmitter();
      const leaving: Handler = async (req, res) => {
        const sleep = sleeps[Number(req.path.split('/')[2]) % sleeps.length] as string;
        try {
          if (place === 'in a later one') await insert(req, req.path);
          req.session.on('query', ({ sql }) => sql === sleep && begun.emit(req.path));
          await req.session.raw(sleep);
          // One that has not been missed by now would be answered with success.
          if (!res.destroyed) await once(res, 'close');
        } catch (error) {
          if ((error as { code?: string }).code !== 'ERR_SESSION_CLOSED') failed.push(error);
          else if ((error as { cause?: { code?: string } }).cause?.code === '57014') cancelled++;
        }
      };
      const staying: Handler = async (req, res) => {
        await insert(req, req.path);
        await req.session.raw('SELECT pg_sleep(0.002)');
        res.sendStatus(201);
      };
      const { port, url, errors } = await ledger.serving(express5Flavour)((req, res, next) =>
        req.path.startsWith('/leaving') ? leaving(req, res, next) : staying(req, res, next),
      );

      let left = 0;
      const leaveOnce = async (i: number): Promise<void> => {
        const path = `/leaving/${i}`;
        const isRunning = once(begun, path);
        const client = (await RawClient.connect(port)).get(path);
        await isRunning;
        await new Promise((resolve) => setTimeout(resolve, i % 8));
        await client.reset();
      };
      let served = 0;
      const serveOnce = async (): Promise<void> => {
        const { status } = await get(`${url}/staying/${served++}`);
        if (status !== 201) failed.push(status);
      };
      const track = async (call: (i: number) => Promise<void>): Promise<void> => {
        while (left < LEAVING) await call(left++);
      };
      const stay = async (): Promise<void> => {
        while (left < LEAVING) await serveOnce();
      };
      await Promise.all([...Array.from({ length: 6 }, () => track(leaveOnce)), ...Array.from({ length: 12 }, stay)]);
      await ledger.isClean();

      expect({ failed, errors }).toEqual({ failed: [], errors: [] });
      const stored = await ledger.stored();
      expect(stored.filter((id) => !id.startsWith('/staying'))).toEqual([]);
      expect(stored).toHaveLength(served);
      // It was a storm: many were hit in their statement, and there were many around them.
      expect(cancelled).toBeGreaterThanOrEqual(LEAVING / sleeps.length);
      expect(served).toBeGreaterThan(50);
    },
  );
});

describe('when a client leaves at any time of a request with statements of all kinds', () => {
  it('tells the handler by the one reason, stores nothing, and keeps the connection', async () => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 } });
    const pid = await pidOf(knex);
    for (let i = 0; i < 40; i++) {
      const victim = await Victim.open(
        ledger,
        async ({ session }, res) => {
          await session.transaction(async (outer) => {
            await outer('notes').insert({ id: 'a' });
            await outer.transaction((inner) => inner.raw('SELECT pg_sleep(0.001)'));
          });
          for await (const _ of session.raw('SELECT pg_sleep(0.0005) FROM generate_series(1, 3)').stream({ batchSize: 1 }));
          await Promise.all([session.raw('SELECT 1'), session.raw('SELECT 2; SELECT 3')]);
          res.sendStatus(409);
        },
        { knex },
      );
      await new Promise((resolve) => setTimeout(resolve, i % 12));
      await victim.client.reset();
      await eventually(() => expect([victim.hasEnded, used(knex)]).toEqual([true, 0]));
      if (victim.error === undefined) continue;
      expect(victim.error).toMatchObject(clientHasGone);
      expect(victim.reasons).toHaveLength(1);
      expect([victim.error, (victim.error as Error).cause]).toContain(victim.reasons[0]);
    }
    expect(await ledger.stored()).toEqual([]);
    expect(await pidOf(knex)).toBe(pid);
  });
});
