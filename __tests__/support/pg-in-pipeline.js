/* For the matrix's cell `pipeline`: every connection of the driver is as if the app had configured it with `pipeline: true`. */
const pg = require('pg');

pg.Client = class Client extends pg.Client {
  /** @param {string | import('pg').ClientConfig} [config] */
  constructor(config) {
    super(config);
    Object.assign(this, { pipeline: true });
  }

  /**
   * @param {any[]} args
   * @override
   */
  query(...args) {
    const [config] = args;
    const isStream = typeof config?.submit === 'function' && !(config instanceof pg.Query);
    // environment.js skips a test that fails of it.
    if (isStream || config?.rows) Object.assign(globalThis, { hasRefusedStream: true });
    return /** @type {any} */ (super.query)(...args);
  }
};
