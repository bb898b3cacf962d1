import { once } from 'node:events';

/**
 * @typedef {object} RunningApp
 * @property {number} port
 * @property {() => Promise<unknown>} stop Ends the server and its connections to the database.
 */

/** @param {import('express').Express} app @param {() => Promise<unknown>} closeDatabase @returns {Promise<RunningApp>} */
export async function listen(app, closeDatabase) {
  const server = app.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = /** @type {import('node:net').AddressInfo} */ (server.address());
  return {
    port,
    async stop() {
      server.close();
      server.closeAllConnections();
      await closeDatabase();
    },
  };
}
