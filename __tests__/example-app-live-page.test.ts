import { once } from 'node:events';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { Knex } from 'knex';
import { createApp, type Ledger } from '../example-app/app';
import { closeServer } from '../example-app/close-server';
import { configFor } from '../example-app/database';
import { migrate } from '../example-app/migrations';
import { ALICE, seedIfEmpty } from '../example-app/seed';
import { describeInChromium, type Tab, useChromium } from './support/chromium';
import { createDatabase, type TestDatabase } from './support/database';
import { eventually, poolUsage } from './support/pool';

/** Runs in the page, and notes each change. */
const RECORDER = `
  globalThis.seen = { mostTaken: 0, mostWaiting: 0, requests: new Map() };
  new MutationObserver((changes) => {
    seen.mostTaken = Math.max(seen.mostTaken, document.querySelectorAll('[data-slot][data-taken=true]').length);
    seen.mostWaiting = Math.max(seen.mostWaiting, Number(document.querySelector('[data-waiting]')?.textContent ?? 0));
    for (const { dataset } of document.querySelectorAll('[data-request]')) {
      const request = seen.requests.get(dataset.request) ?? { phases: [], outcome: undefined };
      seen.requests.set(dataset.request, request);
      if (request.phases.at(-1) !== dataset.phase) request.phases.push(dataset.phase);
      request.outcome = dataset.outcome;
    }
  }).observe(document, { subtree: true, childList: true, attributes: true });
`;

const PHASES = ['running', 'waiting', 'holding', 'settling', 'responding', 'done'];

/*
 * What a person sees who presses the buttons, against what the browser has received and what is in the database. What happens to a request
 * is the package's doing, and is tested elsewhere; here it must be told as it is.
 */
describeInChromium('the live page', () => {
  const live = useChromium(RECORDER);
  let database: TestDatabase;
  let knex: Knex;
  let ledger: Ledger;
  let server: Server;
  let url: string;
  let storedBefore: string[];

  beforeAll(async () => {
    database = await createDatabase();
    knex = database.knex(configFor(database.url));
    await migrate(knex);
    await seedIfEmpty(knex);
    await listen(0);
  });
  beforeEach(async () => {
    storedBefore = await database.admin('transfers').pluck('id');
    await live.open(url);
    await live.page.locator('html[data-live=connected]').waitFor();
  });
  afterEach(async () => {
    expect(live.errors).toEqual([]);
    expect(live.failures).toEqual([]);
    await eventually(async () => expect(await busyBackends()).toEqual([]));
    expect(poolUsage(knex)).toMatchObject({ used: 0, pendingAcquires: 0 });
  });
  afterAll(async () => {
    await stopListening();
    await database.drop();
  });

  async function listen(port: number): Promise<void> {
    ledger = createApp(knex, { logError() {} });
    server = createServer(ledger.app).listen(port);
    await once(server, 'listening');
    url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
  }

  /** As server.ts does, but that it would wait for a page that is open. */
  function stopListening(): Promise<void> {
    const closed = closeServer(server, ledger.sessions, { lingerMs: 60_000 });
    ledger.endStreams();
    return closed;
  }

  /** Transfers that are stored since the test began. */
  const newTransfers = (): Promise<string[]> => database.admin('transfers').whereNotIn('id', storedBefore).pluck('id');

  const busyBackends = async (): Promise<unknown[]> =>
    database
      .admin('pg_stat_activity')
      .whereRaw("datname = current_database() and application_name = 'ledger' and state <> 'idle'")
      .select('state', 'query');

  const expectShown = (requests: Seen['requests']): Promise<void> =>
    eventually(async () => expect((await seen(live)).requests).toEqual(requests));

  describe('when a button is pressed', () => {
    it('shows a transfer that is stored', async () => {
      expect(await press(live, 'transfer')).toEqual({ client: '201 Created', database: 'stored' });

      expect(asked(live)).toEqual(['POST /transfers 201', 'GET /transfers/:id 200']);
      expect(live.responses.filter((response) => !response.endsWith(' 200'))).toEqual(['POST /transfers 201']); // All its files are there.
      expect(await newTransfers()).toHaveLength(1);
      await expectShown([{ phases: PHASES, outcome: 'committed' }]);
      expect((await seen(live)).mostTaken).toBe(1);
      await expectAllFree(live);
    });

    it('shows a COMMIT that fails, and that the client was told so', async () => {
      expect(await press(live, 'commit-fails')).toEqual({ client: expect.stringMatching(/^409 Conflict/), database: 'not stored' });

      expect(asked(live)).toEqual(['POST /transfers 409', 'GET /transfers/:id 404']);
      expect(await newTransfers()).toEqual([]);
      await expectShown([{ phases: PHASES, outcome: 'rolled back' }]);
      await expectAllFree(live);
    });

    it('shows a 201 that has become a 500, as the transaction was given up', async () => {
      expect(await press(live, 'swallowed')).toEqual({ client: expect.stringMatching(/^500 /), database: 'not stored' });

      expect(asked(live)).toEqual(['POST /live/demo/swallowed 500', 'GET /transfers/:id 404']);
      expect(await newTransfers()).toEqual([]);
      await expectShown([{ phases: PHASES, outcome: 'rolled back' }]);
      expect(await live.page.locator('[data-request]').innerText()).toContain('ERR_TRANSACTION_ABORTED');
      await expectAllFree(live);
    });

    it('shows a client that goes away: nothing is stored, and the connection is back before the statement would have ended', async () => {
      expect(await press(live, 'disconnect')).toEqual({ client: 'nothing: it went away', database: 'not stored' });

      expect(live.failures.splice(0)).toEqual(['POST /live/demo/slow net::ERR_ABORTED']);
      expect(asked(live)).toEqual(['GET /transfers/:id 404']);
      expect(await newTransfers()).toEqual([]);
      await expectShown([{ phases: PHASES.filter((phase) => phase !== 'responding'), outcome: 'rolled back' }]);
      const [, heldMs] = (await live.page.locator('[data-request]').innerText()).match(/held (\d+) ms/) ?? [];
      expect(Number(heldMs)).toBeLessThan(1_500);
      await expectAllFree(live);
    });

    it('shows a slow reader, who keeps no connection, and twenty others who share all five meanwhile', async () => {
      const { page } = live;
      const reading = press(live, 'slow-reader');
      await page.locator('[data-request][data-phase=responding]').waitFor();
      await expectAllFree(live);
      expect(poolUsage(knex).used).toBe(0);

      expect(await press(live, 'twenty')).toEqual({ client: '20 × 201', database: '20 of 20 stored' });
      await expectAllFree(live);

      expect(await newTransfers()).toHaveLength(20);
      const { mostTaken, mostWaiting } = await seen(live);
      expect(mostTaken).toBe(5);
      expect(mostWaiting).toBeGreaterThan(5);
      expect(await reading).toMatchObject({ client: expect.stringMatching(/^200 OK: 3\d MB in/) });
      await expectShown(Array(21).fill({ phases: PHASES, outcome: 'committed' }));
      expect(asked(live)).toContain('GET /live/demo/large 200');
    });
  });

  describe('when somebody else sends a request', () => {
    it('shows it on every page that is open', async () => {
      const other = await live.page.context().newPage();
      await other.goto(url);
      await other.locator('html[data-live=connected]').waitFor();

      await (await fetch(`${url}accounts/${ALICE}`)).json();

      for (const page of [live.page, other]) {
        await page.locator('[data-request][data-phase=done][data-outcome=committed]').waitFor();
        expect(await page.locator('[data-request]').allInnerTexts()).toEqual([
          expect.stringMatching(/GET \/accounts\/:id\s.*200 .*committed/),
        ]);
      }
      await other.close();
    });
  });

  describe('when the server is restarted', () => {
    it('says that the connection is lost, and goes on when it is back', async () => {
      await stopListening();
      await live.page.locator('html[data-live=lost]').waitFor();
      await listen(Number(new URL(url).port));
      await live.page.locator('html[data-live=connected]').waitFor();

      for (const failure of live.failures.splice(0)) expect(failure).toMatch(/^GET \/live\/events /);
      expect(await press(live, 'transfer')).toEqual({ client: '201 Created', database: 'stored' });
      await expectShown([{ phases: PHASES, outcome: 'committed' }]);
    });
  });

  describe('when it is used by keyboard and screen reader', () => {
    it('has an outline, a name for each button, and no id twice', async () => {
      const { page } = live;

      expect(await page.getByRole('heading', { level: 1 }).count()).toBe(1);
      const levels: number[] = await page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(({ tagName }) => +tagName[1])");
      expect(levels.filter((level, i) => level > (levels[i - 1] ?? 0) + 1)).toEqual([]);
      const names = (await page.locator('body').ariaSnapshot()).match(/(?<=- button ").+(?=")/g);
      expect(new Set(names).size).toBe(6);
      const ids: string[] = await page.evaluate("[...document.querySelectorAll('[id]')].map(({ id }) => id)");
      expect(ids).toEqual([...new Set(ids)]);
    });

    it('runs a demo, keeps the focus, and says what has become of it', async () => {
      const { page } = live;
      const focused = page.locator(':focus');
      await page.keyboard.press('Tab');
      expect(await focused.getAttribute('data-demo')).toBe('transfer');
      await page.keyboard.press('Tab');

      await page.keyboard.press('Enter');
      await page.locator('[data-result=commit-fails][data-state=done]').waitFor();

      expect(await focused.getAttribute('data-demo')).toBe('commit-fails');
      expect(await page.locator('[aria-live=polite]').textContent()).toMatch(/409 Conflict.*not stored/);
      expect(await newTransfers()).toEqual([]);
    });
  });

  describe.each([
    ['light', 360],
    ['dark', 1_200],
  ] as const)('when the screen is %s and %d px wide', (colorScheme, width) => {
    it('shows what happens in these colours, without scrolling sideways, and still for who wants it so', async () => {
      await live.page.setViewportSize({ width, height: 740 });
      await live.page.emulateMedia({ colorScheme, reducedMotion: 'reduce' });
      await live.open(url);

      await press(live, 'commit-fails');

      const look: object = await live.page.evaluate(`({
        width: document.documentElement.scrollWidth,
        isDark: getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((part) => part < 100),
        animations: document.getAnimations().length,
      })`);
      expect(look).toEqual({ width, isDark: colorScheme === 'dark', animations: 0 });
    });
  });
});

type Demo = 'transfer' | 'commit-fails' | 'swallowed' | 'disconnect' | 'twenty' | 'slow-reader';

/** Presses a button, and reads what the page says of it in the end. */
async function press({ page }: Tab, demo: Demo): Promise<{ client: string; database: string }> {
  await page.locator(`[data-demo=${demo}]`).click();
  const result = page.locator(`[data-result=${demo}][data-state=done]`);
  await result.waitFor();
  return { client: await result.locator('[data-client]').innerText(), database: await result.locator('[data-database]').innerText() };
}

/** What the demos have asked the server, and its answers. */
const asked = ({ responses }: Tab): string[] => responses.filter((response) => /^(POST|GET \/(transfers|live\/demo)\/)/.test(response));

async function expectAllFree({ page }: Tab): Promise<void> {
  await page.locator('[data-slot][data-taken=false]').nth(4).waitFor();
  expect(await page.locator('[data-slot]').count()).toBe(5);
  expect(await page.locator('[data-waiting]').innerText()).toBe('0');
}

/** What the page has shown at any time. */
interface Seen {
  mostTaken: number;
  mostWaiting: number;
  requests: { phases: string[]; outcome: string }[];
}

const seen = ({ page }: Tab): Promise<Seen> => page.evaluate('({ ...seen, requests: [...seen.requests.values()] })');
