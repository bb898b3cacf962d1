import express from 'express';
import { sessionChannels, sessionMiddleware, type TransactionMessage } from 'express-knex-session';
import { useEvents } from './support/events';
import { runExample } from './support/example-bench';
import { get, type Listening } from './support/http';
import { type Handler, insert, useLedger } from './support/ledger';
import { exampleIn, sectionOf, tableIn } from './support/pages';
import { failOnWarnings } from './support/warnings';

/* Runs the examples of docs/events.md, and compares its tables. */
failOnWarnings();
const ledger = useLedger();
const events = useEvents();
const PAGE = 'docs/events.md';

/** Runs an example, and takes back what it has subscribed. */
async function withExample(code: string, scope: Record<string, unknown>, work: () => Promise<unknown>): Promise<void> {
  const ends: (() => void)[] = [];
  const channels = Object.fromEntries(
    Object.entries(sessionChannels).map(([name, channel]) => {
      const subscribe = (listener: never) => {
        channel.subscribe(listener);
        ends.push(() => channel.unsubscribe(listener));
      };
      return [name, { subscribe }];
    }),
  );
  await runExample(code, { sessionChannels: channels, ...scope });
  try {
    await work();
  } finally {
    for (const end of ends) end();
  }
}

async function serve(handler: Handler): Promise<Listening> {
  const app = express().use(sessionMiddleware(ledger.knex), async (req, res, next) => handler(req, res, next));
  return ledger.listen(app);
}

describe('docs/events.md', () => {
  it('names the channels that there are', () => {
    const rows = tableIn(sectionOf('Channels', PAGE)).map(([key, name]) => [key, name]);
    const wanted = Object.entries(sessionChannels).map(([key, { name }]) => [`\`${key}\``, `\`${String(name)}\``]);
    expect(rows).toEqual(wanted);
  });

  it('has each field of the message of a transaction', async () => {
    const { url } = await serve((req, res) => insert(req, 'a').then(() => res.sendStatus(201)));
    await get(url);
    const [settled] = await events.settled();
    const [fields = ''] = sectionOf('Messages', PAGE).split('| `reason` | the end');
    const named = tableIn(fields).map(([field]) => field?.replaceAll('`', ''));
    expect(new Set([...named, 'session', 'request'])).toEqual(new Set(Object.keys(settled as TransactionMessage)));
  });

  it('has an example that logs each transaction in one line', async () => {
    const lines: unknown[] = [];
    const log = { info: (line: unknown) => void lines.push(line) };
    const { url } = await serve((req, res) => insert(req, 'a').then(() => res.sendStatus(201)));
    await withExample(exampleIn('events', 'log.info'), { log }, () => get(`${url}/path`));
    expect(lines).toEqual([
      expect.objectContaining({ url: '/path', outcome: 'committed', reason: 'response', statements: 1, bytesHeld: 7 }),
    ]);
  });

  it('has an example that gives the alarm', async () => {
    const alarms: string[] = [];
    const note = (...values: unknown[]) => void alarms.push(values.map(String).join(' ').split('\n')[0] as string);
    const log = { warn: note, error: note };
    let onInterval!: () => void;
    const setInterval = (work: () => void) => {
      onInterval = work;
      return { unref() {} };
    };
    const sessions = { stats: () => ({ open: 3 }) };
    const { url } = await serve(async (req, res) => {
      await insert(req, 'a', 'die');
      await req.session.commit().catch(() => {});
      await insert(req, 'b').catch(() => {});
      res.end();
    });
    await withExample(exampleIn('events', 'setInterval'), { log, setInterval, sessions }, () => get(`${url}/path`));
    onInterval();
    expect(alarms).toEqual([
      expect.stringMatching(/^A connection was destroyed\. /),
      'Stored or not? Look in the database. /path',
      expect.stringMatching(/^\/path SessionClosedError: /),
    ]);
  });

  it('has an example that says who holds a connection', async () => {
    const warnings: string[] = [];
    const log = { warn: (text: string) => void warnings.push(text) };
    const code = exampleIn('events', 'warnAfter').replace('1_000', '20');
    const app = express();
    await withExample(code, { log, app, sessionMiddleware, knex: ledger.knex }, async () => {
      app.get('/reports/:id', async (req, res) => {
        await req.session.raw('SELECT pg_sleep(0.04)');
        res.end();
      });
      const { url } = await ledger.listen(app);
      await get(`${url}/reports/1`);
    });
    expect(warnings).toEqual([expect.stringMatching(/^SessionOpenLongError: GET \/reports\/:id .*\n {4}Last statement: SELECT pg_sleep/)]);
  });
});
