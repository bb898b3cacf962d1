/* A whole other stack: Fastify with @fastify/postgres, response schemas as its documentation recommends. */
import { createRequire } from 'node:module';
import { pipeline } from 'node:stream/promises';
import pg from 'pg';
import QueryStream from 'pg-query-stream';
import { pgPool, tenFrom, toLines } from './data.mjs';

const SELECT = 'SELECT * FROM accounts WHERE id = $1';
const account = { type: 'object', properties: { id: { type: 'integer' }, name: { type: 'string' }, balance: { type: 'integer' } } };
const answers = (/** @type {object} */ schema) => ({ schema: { response: { '2xx': schema } } });

/** @param {{ url: string }} settings @returns {Promise<import('./listen.mjs').RunningApp>} */
export async function start({ url }) {
  // Not `import`: the type check must pass where the peers are not installed.
  const require = createRequire(import.meta.url);
  const fastify = require('fastify')();
  await fastify.register(require('@fastify/postgres'), { pg, connectionString: url, ...pgPool });
  /** @type {<Result>(work: (client: import('pg').PoolClient) => Promise<Result>) => Promise<Result>} */
  const transact = fastify.pg.transact;

  fastify.get('/untouched', answers({ type: 'object', properties: { ok: { type: 'boolean' } } }), async () => ({ ok: true }));

  fastify.get('/select/:id', answers(account), async (/** @type {any} */ req) => {
    const { rows } = await transact((client) => client.query(SELECT, [req.params.id]));
    return rows[0];
  });

  fastify.post('/insert/:id', answers(account), async (/** @type {any} */ req, /** @type {any} */ reply) => {
    const found = await transact(async (client) => {
      const { rows } = await client.query(SELECT, [req.params.id]);
      await client.query('INSERT INTO entries (account, amount) VALUES ($1, $2)', [rows[0].id, 10]);
      return rows[0];
    });
    reply.code(201);
    return found;
  });

  fastify.get('/ten/:id', answers({ type: 'array', items: account }), (/** @type {any} */ req) =>
    transact(async (client) => {
      const found = [];
      for (const id of tenFrom(req.params.id)) found.push((await client.query(SELECT, [id])).rows[0]);
      return found;
    }),
  );

  fastify.get('/all/:id', answers({ type: 'array', items: account }), async (/** @type {any} */ req) => {
    const results = await transact((client) => Promise.all(tenFrom(req.params.id).map((id) => client.query(SELECT, [id]))));
    return results.map(({ rows }) => rows[0]);
  });

  fastify.get('/stream', async (/** @type {any} */ _req, /** @type {any} */ reply) => {
    // Beside Fastify: a reply that is sent after the handler would read its rows after COMMIT.
    reply.hijack();
    await transact(async (client) => {
      const rows = client.query(new QueryStream('SELECT * FROM accounts ORDER BY id'));
      await pipeline(rows, toLines, reply.raw.setHeader('Content-Type', 'application/x-ndjson'));
    });
  });

  await fastify.listen({ port: 0, host: '127.0.0.1' });
  return {
    port: fastify.server.address().port,
    stop() {
      fastify.server.closeAllConnections();
      return fastify.close();
    },
  };
}
