/* postgres.js: another driver, with sql.begin(). It prepares its statements, as is its default. */
import { createRequire } from 'node:module';
import { pipeline } from 'node:stream/promises';
import express from 'express';
import { POOL_SIZE, tenFrom, toLines } from './data.mjs';
import { listen } from './listen.mjs';

/** @param {{ url: string }} settings */
export function start({ url }) {
  // Not `import`: the type check must pass where the peers are not installed.
  const postgres = createRequire(import.meta.url)('postgres');
  const sql = postgres(url, { max: POOL_SIZE });
  const app = express();

  app.get('/select/:id', async (req, res) => {
    const [account] = await sql.begin((/** @type {any} */ tx) => tx`SELECT * FROM accounts WHERE id = ${req.params.id}`);
    res.json(account);
  });

  app.post('/insert/:id', async (req, res) => {
    const account = await sql.begin(async (/** @type {any} */ tx) => {
      const [found] = await tx`SELECT * FROM accounts WHERE id = ${req.params.id}`;
      await tx`INSERT INTO entries (account, amount) VALUES (${found.id}, ${10})`;
      return found;
    });
    res.status(201).json(account);
  });

  app.get('/ten/:id', async (req, res) => {
    const accounts = await sql.begin(async (/** @type {any} */ tx) => {
      const all = [];
      for (const id of tenFrom(req.params.id)) {
        const [found] = await tx`SELECT * FROM accounts WHERE id = ${id}`;
        all.push(found);
      }
      return all;
    });
    res.json(accounts);
  });

  app.get('/all/:id', async (req, res) => {
    // An array of queries is pipelined, and awaited.
    const results = await sql.begin((/** @type {any} */ tx) =>
      tenFrom(req.params.id).map((id) => tx`SELECT * FROM accounts WHERE id = ${id}`),
    );
    res.json(results.map((/** @type {any[]} */ [found]) => found));
  });

  app.get('/stream', async (_req, res) => {
    await sql.begin(async (/** @type {any} */ tx) => {
      await pipeline(rowsOf(tx`SELECT * FROM accounts ORDER BY id`.cursor(100)), toLines, res.type('application/x-ndjson'));
    });
  });

  return listen(app, () => sql.end());
}

/** @param {AsyncIterable<object[]>} batches */
async function* rowsOf(batches) {
  for await (const batch of batches) yield* batch;
}
