/*
 * Makes the README's pictures of the live page, docs/images/live-*.png: `node tools/screenshots.mjs`. Needs Chromium.
 *
 * The app runs on a PostgreSQL of its own with an empty ledger, so that they come out alike each time.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmod, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { launchChromium } from './chromium.js';
import { withFewColours } from './png.mjs';

const root = fileURLToPath(new URL('..', import.meta.url));
const target = join(root, 'docs/images');

/** @type {{ name: string, colorScheme: 'light' | 'dark', viewport: { width: number, height: number } }[]} */
const pictures = [
  { name: 'live-light', colorScheme: 'light', viewport: { width: 1200, height: 1000 } },
  { name: 'live-dark', colorScheme: 'dark', viewport: { width: 1200, height: 1000 } },
  { name: 'live-phone', colorScheme: 'light', viewport: { width: 360, height: 780 } },
];

const folder = await mkdtemp(join(tmpdir(), 'screenshots-'));
await chmod(folder, 0o755); // As root, another user runs the server.
const server = spawn(process.execPath, ['--import', 'tsx', 'example-app/server.ts'], {
  cwd: root,
  env: { ...process.env, DATABASE_URL: '', DATA_DIR: join(folder, 'data'), PORT: '0' },
  stdio: ['ignore', 'pipe', 'inherit'],
});
const exited = once(server, 'exit');
try {
  const url = await urlOf(server.stdout);
  const browser = await launchChromium();
  try {
    await mkdir(target, { recursive: true });
    for (const picture of pictures) await take(browser, url, picture);
  } finally {
    await browser.close();
  }
} finally {
  server.kill('SIGTERM');
  await exited;
  await rm(folder, { recursive: true, force: true });
}

/**
 * @param {import('node:stream').Readable} output
 * @returns {Promise<string>}
 */
function urlOf(output) {
  return new Promise((resolve, reject) => {
    const lines = createInterface({ input: output });
    lines.on('line', (line) => {
      const [url] = line.match(/http:\S+/) ?? [];
      if (url) resolve(url);
    });
    lines.once('close', () => reject(new Error('The example app did not start.')));
  });
}

/**
 * @param {import('playwright-core').Browser} browser
 * @param {string} url
 * @param {(typeof pictures)[number]} picture
 */
async function take(browser, url, { name, colorScheme, viewport }) {
  const page = await browser.newPage({ colorScheme, viewport });
  await page.goto(url);
  await page.locator('html[data-live=connected]').waitFor();
  for (const demo of ['transfer', 'commit-fails', 'disconnect']) {
    await page.locator(`[data-demo=${demo}]`).click();
    await page.locator(`[data-result=${demo}][data-state=done]`).waitFor();
  }

  await page.locator('[data-demo=twenty]').click();
  await page.mouse.move(0, 0);
  if (viewport.width > 1000) await page.evaluate('scrollTo(0, 0)'); // Else the pool stays in sight.
  // In the middle of it: some are done, all connections are taken, and others wait for one.
  await page.locator('[data-request][data-phase=done]').nth(3).waitFor();
  const png = withFewColours(await page.screenshot());
  await writeFile(join(target, `${name}.png`), png);
  console.log(`${name}.png: ${Math.round(png.length / 1000)} kB`);

  await page.locator('[data-result=twenty][data-state=done]').waitFor();
  await page.close();
}
