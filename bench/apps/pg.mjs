/* pg alone, BEGIN and COMMIT by hand. */
import { pipeline } from 'node:stream/promises';
import express from 'express';
import pg from 'pg';
import QueryStream from 'pg-query-stream';
import { pgPool, tenFrom, toLines } from './data.mjs';
import { listen } from './listen.mjs';

const SELECT = 'SELECT * FROM accounts WHERE id = $1';

/** @param {{ url: string }} settings */
export function start({ url }) {
  const pool = new pg.Pool({ connectionString: url, ...pgPool });
  const app = express();

  /**
   * @template Result
   * @param {(client: import('pg').PoolClient) => Promise<Result>} work
   */
  async function transaction(work) {
    const client = await pool.connect();
    try {
      await client.query('BEGIN');
      const result = await work(client);
      await client.query('COMMIT');
      return result;
    } catch (error) {
      await client.query('ROLLBACK');
      throw error;
    } finally {
      client.release();
    }
  }

  app.get('/select/:id', async (req, res) => {
    const { rows } = await transaction((client) => client.query(SELECT, [req.params.id]));
    res.json(rows[0]);
  });

  app.post('/insert/:id', async (req, res) => {
    const account = await transaction(async (client) => {
      const { rows } = await client.query(SELECT, [req.params.id]);
      await client.query('INSERT INTO entries (account, amount) VALUES ($1, $2)', [rows[0].id, 10]);
      return rows[0];
    });
    res.status(201).json(account);
  });

  app.get('/ten/:id', async (req, res) => {
    const accounts = await transaction(async (client) => {
      const found = [];
      for (const id of tenFrom(req.params.id)) found.push((await client.query(SELECT, [id])).rows[0]);
      return found;
    });
    res.json(accounts);
  });

  app.get('/all/:id', async (req, res) => {
    const results = await transaction((client) => Promise.all(tenFrom(req.params.id).map((id) => client.query(SELECT, [id]))));
    res.json(results.map(({ rows }) => rows[0]));
  });

  app.get('/stream', async (_req, res) => {
    await transaction(async (client) => {
      const rows = client.query(new QueryStream('SELECT * FROM accounts ORDER BY id'));
      await pipeline(rows, toLines, res.type('application/x-ndjson'));
    });
  });

  return listen(app, () => pool.end());
}
