import type { Browser, Page, Request } from 'playwright-core';
import { findChromium, launchChromium } from '../../tools/chromium.js';

declare global {
  // Playwright's types name these of the browser's. The rest of the browser's types would hide Node's (`fetch`, `setTimeout`).
  interface Node {
    readonly nodeType: number;
  }
  interface HTMLElement extends Node {}
  interface SVGElement extends Node {}
  interface HTMLElementTagNameMap {
    readonly [name: string]: HTMLElement;
  }
}

const isInstalled = findChromium() !== undefined;

/** A `describe` whose tests are skipped, and say why, where there is no Chromium. */
export function describeInChromium(name: string, tests: () => void): void {
  if (isInstalled) {
    describe(name, tests);
    return;
  }
  console.warn(`Skipped: Chromium is not installed (Debian: apt-get install chromium). Not tested in a browser: ${name}.`);
  describe.skip(`${name} (skipped: Chromium is not installed)`, tests);
}

/** A page in Chromium, and what has come of it since it was opened. */
export interface Tab {
  readonly page: Page;
  /** Responses as the browser has received them, such as `'GET /transfers/:id 404'`. */
  readonly responses: string[];
  /** Requests that have got no response, such as `'POST /transfers net::ERR_ABORTED'`. */
  readonly failures: string[];
  /** What scripts have thrown, and errors on the console; but not that a response was an error, which may be wanted. */
  readonly errors: string[];
  /** Opens a URL, and forgets what was before. */
  open(url: string): Promise<void>;
}

/**
 * A browser for the tests of a `describe`, and a tab in it. A new tab for each test would cost more than most of the tests do.
 *
 * @param script runs in each page before the page's own scripts
 */
export function useChromium(script: string): Tab {
  let browser: Browser | undefined;
  const tab = { responses: [] as string[], failures: [] as string[], errors: [] as string[] } as { -readonly [Key in keyof Tab]: Tab[Key] };
  beforeAll(async () => {
    browser = await launchChromium();
    const context = await browser.newContext(); // In which a test may open more tabs.
    const page = await context.newPage();
    page.setDefaultTimeout(10_000);
    await page.addInitScript(script);
    page.on('response', (response) => tab.responses.push(`${nameOf(response.request())} ${response.status()}`));
    page.on('requestfailed', (request) => tab.failures.push(`${nameOf(request)} ${request.failure()?.errorText}`));
    page.on('pageerror', (error) => tab.errors.push(String(error)));
    page.on('console', (message) => {
      if (message.type() === 'error' && !message.text().startsWith('Failed to load resource')) tab.errors.push(message.text());
    });
    tab.page = page;
  });
  afterAll(() => browser?.close());

  tab.open = async (url) => {
    await tab.page.goto('about:blank'); // What the page before still asks for ends here.
    for (const list of [tab.responses, tab.failures, tab.errors]) list.length = 0;
    await tab.page.goto(url, { waitUntil: 'domcontentloaded' });
  };
  return tab;
}

const nameOf = (request: Request): string => `${request.method()} ${new URL(request.url()).pathname.replace(/[0-9a-f-]{36}/g, ':id')}`;
