import type { SessionOptions } from 'express-knex-session';
import { openSite } from './support/deadlines';
import { useEvents } from './support/events';
import { get, RawClient } from './support/http';
import { flavours, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';
import { waysToEnd } from './support/ways-to-end';

/* After each test, useEvents() looks whether all that was acquired has settled: once, and in order. */
failOnWarnings();
const ledger = useLedger();
const events = useEvents();

const modes: [string, SessionOptions][] = [
  ['in whole', {}],
  ["with commitAt: 'end'", { commitAt: 'end' }],
  ["with commitAt: 'finish'", { commitAt: 'finish' }],
];

describe.each(flavours)('on $version, when requests end in all ways at once', (flavour) => {
  it.each(modes)('%s: what is told agrees with stats(), and with what is stored', async (_, options) => {
    const site = await openSite(ledger, (req, res, next) => waysToEnd[Number(req.query['way'])]?.handler(req, res, next), {
      flavour,
      ...options,
    });
    await Promise.all(waysToEnd.map((_, way) => get(`${site.url}/?way=${way}&id=${way}`, { signal: AbortSignal.timeout(4_000) })));
    await ledger.isClean();
    const { committed, rolledBack, unknown } = site.sessions.stats();
    // One that was given up before it had a connection has nothing to be counted.
    const settled = events.told
      .filter(({ channel, asTold }) => channel === 'settled' && asTold.outcome !== 'unused')
      .map(({ asTold }) => asTold);
    const count = (outcome: string) => settled.filter((message) => message.outcome === outcome).length;
    expect({ committed: count('committed'), rolledBack: count('rolled back'), unknown: count('unknown') }).toEqual({
      committed,
      rolledBack,
      unknown,
    });
    const stored = new Set((await ledger.stored()).map((id) => id.split(' ')[0]));
    for (const { request, outcome } of settled) {
      if (outcome !== 'unknown')
        expect([request?.query['id'], stored.has(String(request?.query['id']))]).toEqual([request?.query['id'], outcome === 'committed']);
    }
  });

  it('and clients that leave at any moment: each is told of, once', async () => {
    const site = await openSite(ledger, (req, res, next) => waysToEnd[Number(req.query['way'])]?.handler(req, res, next), { flavour });
    await Promise.all(
      waysToEnd.map(async (_, way) => {
        const client = (await RawClient.connect(site.port)).get(`/?way=${way}&id=${way}&pause=${way % 7}`);
        await new Promise((resolve) => setTimeout(resolve, way % 12));
        await (way % 2 ? client.reset() : client.destroy());
      }),
    );
    await ledger.isClean();
    const { committed, rolledBack, unknown, open, waiting } = site.sessions.stats();
    expect({ open, waiting }).toEqual({ open: 0, waiting: 0 });
    const outcomes = events.told.filter(({ channel, asTold }) => channel === 'settled' && asTold.outcome !== 'unused');
    expect(outcomes).toHaveLength(committed + rolledBack + unknown);
  });
});
