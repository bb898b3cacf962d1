/*
 * An app for launcher.test.ts: starts a server, tells about it, restarts it at SIGUSR1 (in order) and SIGUSR2 (as after a crash),
 * and waits for SIGTERM or SIGINT to stop it in order.
 */
import pg from 'pg';
import { startPostgres } from '../../tools/postgres.mjs';

const tell = (/** @type {object} */ message) => process.stdout.write(`${JSON.stringify(message)}\n`);
const keepRunning = setInterval(() => {}, 60_000);

try {
  const server = await startPostgres(JSON.parse(process.argv[2] ?? '{}'));
  const stop = async (/** @type {string} */ signal) => {
    // As an app that finishes its requests first: the server must still be there.
    const client = new pg.Client(server.url);
    await client.connect();
    const { rows } = await client.query('SELECT 1 AS alive');
    await client.end();
    await server.stop();
    tell({ stopped: signal, ...rows[0] });
    clearInterval(keepRunning);
  };
  const restart = (/** @type {'immediate' | 'fast' | undefined} */ mode) =>
    server.restart({ ...(mode && { mode }) }).then(
      () => tell(server),
      (error) => tell({ error: String(error) }),
    );
  process.on('SIGUSR1', () => restart('fast')).on('SIGUSR2', () => restart(undefined));
  process.once('SIGTERM', stop).once('SIGINT', stop);
  tell(server);
} catch (error) {
  tell({ error: String(error) });
  clearInterval(keepRunning);
}
