/* What starts Chromium, for the tests of the live page and for screenshots.mjs. It is not in npm: Debian and Ubuntu have it. */
const { accessSync, constants } = require('node:fs');
const { delimiter, join } = require('node:path');

const NAMES = ['chromium', 'google-chrome', 'google-chrome-stable', 'chromium-browser'];

/** Where Chromium or Chrome is installed, if it is; `CHROMIUM_PATH` says to use another. */
exports.findChromium = () => {
  const asked = process.env['CHROMIUM_PATH'];
  if (asked) return asked;
  const folders = [...(process.env['PATH'] ?? '').split(delimiter).filter(Boolean), '/usr/bin', '/snap/bin'];
  return NAMES.flatMap((name) => folders.map((folder) => join(folder, name))).find(isExecutable);
};

/**
 * Starts the Chromium that {@link exports.findChromium} has found, without a window. It never outlives this process: they talk through a
 * pipe, and it ends with that.
 *
 * @returns {Promise<import('playwright-core').Browser>}
 */
exports.launchChromium = async () => {
  const executablePath = exports.findChromium();
  if (executablePath === undefined) throw new Error('Chromium is not installed (Debian: apt-get install chromium).');

  const { chromium } = require('playwright-core');
  // Its sandbox refuses to work for root, and in most containers. What is opened here is our own page.
  return chromium.launch({ executablePath, chromiumSandbox: false, handleSIGINT: false, handleSIGTERM: false, handleSIGHUP: false });
};

/** @param {string} path */
function isExecutable(path) {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}
