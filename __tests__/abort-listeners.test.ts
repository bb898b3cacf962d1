import type { EventEmitter } from 'node:events';
import { type Session, withSession } from 'express-knex-session';
import { ENDLESS, pidOf, useAborts, used } from './support/abort';
import { get, keepAliveAgent, RawClient } from './support/http';
import { express5Flavour, insert } from './support/ledger';
import type { Resource } from './support/matrix-pool';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

// MaxListenersExceededWarning would fail the file.
failOnWarnings();
const aborts = useAborts();

/** How many listeners there are on pg's client, on its connection to the wire, and on the socket of that. */
function countListeners(client: Resource): number[] {
  const { connection } = client;
  const emitters = [client, connection, connection.stream] as unknown as EventEmitter[];
  return emitters.map((emitter) => emitter.eventNames().reduce((sum, name) => sum + emitter.listenerCount(name), 0));
}

describe('when 50 requests are left in a running statement, one after the other on one connection of the pool', () => {
  it('gathers no listeners on that connection, and it is still the same', async () => {
    const knex = aborts.ledger.pool({ pool: { min: 0, max: 1 } });
    const pid = await pidOf(knex);
    const resource = (): Resource => knex.client.pool.free[0].resource;
    // The first session leaves its watch, for all that follow.
    await withSession(knex, (session) => session.raw('SELECT 1'));
    const before = countListeners(resource());
    let left = 0;
    let begun: (() => void) | undefined;
    const { port } = await aborts.ledger.serving(express5Flavour)(
      async (req) => {
        await insert(req, req.path);
        req.session.on('query', () => begun?.());
        await req.session.raw(ENDLESS).catch((error) => {
          left++;
          throw error;
        });
      },
      { knex },
    );
    for (let i = 0; i < 50; i++) {
      const isRunning = new Promise<void>((resolve) => {
        begun = resolve;
      });
      const client = (await RawClient.connect(port)).get(`/${i}`);
      await isRunning;
      await client.reset();
      await eventually(() => expect([left, used(knex)]).toEqual([i + 1, 0]));
    }
    expect(await pidOf(knex)).toBe(pid);
    expect(countListeners(resource())).toEqual(before);
    expect(await aborts.ledger.stored()).toEqual([]);
  });
});

describe('when 100 requests of one kept-alive connection ask for the signal', () => {
  it.each([
    ['and run a statement', (session: Session) => session.raw('SELECT 1')],
    ['and run none', () => undefined],
  ])('%s: leaves no listener on its socket', async (_, run) => {
    const counts: number[] = [];
    const signals: AbortSignal[] = [];
    const { url } = await aborts.ledger.serving(express5Flavour)(async (req, res) => {
      counts.push(req.socket.eventNames().reduce((sum, name) => sum + req.socket.listenerCount(name), 0));
      signals.push(req.session.signal);
      await run(req.session);
      res.sendStatus(200);
    });
    const agent = keepAliveAgent();
    for (let i = 0; i < 100; i++) expect(await get(url, { agent })).toMatchObject({ status: 200 });
    // The first finds the socket without our one listener for all.
    expect(new Set(counts.slice(1)).size).toBe(1);
    expect(signals.some(({ aborted }) => aborted)).toBe(false);
    agent.destroy();
  });
});

describe('when a statement cannot be cancelled for a long time', () => {
  it('asks again, without a warning', async () => {
    const { knex, proxy } = await aborts.ledger.throughProxy({ pool: { min: 0, max: 1 } });
    const victim = await aborts.open(
      async (req) => {
        await insert(req, 'a');
        await req.session.raw(STUBBORN);
      },
      { knex, settleTimeout: 3_000 },
    );
    const cancels = (): number => proxy.frontend.filter(({ type }) => type === 'CancelRequest').length;
    await victim.isSleeping();
    await victim.client.reset();
    await eventually(() => expect(cancels()).toBeGreaterThanOrEqual(4));
    await victim.isOver();
    await victim.leftNothing();
    expect(victim.reasons).toHaveLength(1);
  });
});

/** Swallows three cancels. */
const STUBBORN = `DO $$ BEGIN
  FOR i IN 1..4 LOOP
    BEGIN
      PERFORM pg_sleep(30);
    EXCEPTION WHEN query_canceled THEN
      IF i = 4 THEN RAISE; END IF;
    END;
  END LOOP;
END $$`;
