import type { Session, SessionOptions } from 'express-knex-session';
import type { Knex } from 'knex';
import { get } from './support/http';
import { express5Flavour, useLedger } from './support/ledger';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

type Call = (...args: any[]) => any;
interface PgConnection {
  processID: number;
  query: Call;
}

const modes: [string, SessionOptions][] = [
  ['in a transaction', {}],
  ['with transaction: false', { transaction: false }],
];

/** In a request. @returns what it has answered */
async function run(work: (session: Session) => Promise<unknown>, options: SessionOptions, knex = ledger.knex): Promise<unknown> {
  const { url } = await ledger.serve(express5Flavour, (app) => app.use(async (req, res) => void res.json(await work(req.session))), {
    knex,
    transactionTimeout: 2_000,
    ...options,
  });
  return JSON.parse((await get(url)).body);
}

/** The second with a value, which makes pg speak another protocol. */
async function runBoth(knex: Knex, options: SessionOptions): Promise<void> {
  const rows = await run(
    async (session) => {
      await session.raw('SELECT 1');
      return (await session.raw('SELECT ?::int AS two', [2])).rows;
    },
    options,
    knex,
  );
  expect(rows).toEqual([{ two: 2 }]);
  expect(poolUsage(knex)).toEqual({ used: 0, free: 1, pendingAcquires: 0 });
}

describe.each(modes)('statements %s', (_mode, options) => {
  it('are passed to a wrapper on a connection that knows no more than what Knex calls', async () => {
    const texts: string[] = [];
    const afterCreate = (connection: PgConnection, done: () => void): void => {
      const { query } = connection;
      connection.query = (config: { text?: string }, callback: Call) => {
        texts.push(config.text ?? String(config));
        return query.call(connection, config, callback);
      };
      done();
    };
    await runBoth(ledger.pool({ pool: { min: 0, max: 1, afterCreate } }), options);
    expect(texts.filter((text) => text.startsWith('SELECT'))).toEqual(['SELECT 1', 'SELECT $1::int AS two']);
  });

  it('are sent by a client class of its own that calls pg in its other way', async () => {
    const Client_PG = ledger.knex.client.constructor as new (config: Knex.Config) => object;
    class Own extends Client_PG {
      async _query(connection: PgConnection, statement: { sql: string; bindings?: unknown[]; response?: unknown }): Promise<object> {
        statement.response = await new Promise((resolve, reject) => {
          connection.query(statement.sql, statement.bindings ?? [], (error: unknown, result: unknown) =>
            error ? reject(error) : resolve(result),
          );
        });
        return statement;
      }
    }
    await runBoth(ledger.pool({ client: Own as never, pool: { min: 0, max: 1 } }), options);
  });

  it('show a client class of its own the connection, but for the first of a transaction', async () => {
    const pids: unknown[] = [];
    const Client_PG = ledger.knex.client.constructor as new (config: Knex.Config) => { _query: Call };
    class Own extends Client_PG {
      override _query = (connection: PgConnection, statement: object): unknown => {
        pids.push(connection.processID);
        return Client_PG.prototype._query.call(this, connection, statement);
      };
    }
    await runBoth(ledger.pool({ client: Own as never, pool: { min: 0, max: 1 } }), options);
    expect(pids).toEqual([options.transaction === false ? expect.any(Number) : undefined, expect.any(Number)]);
  });

  it('keep what their options ask of pg', async () => {
    const rows = await run(async (session) => {
      const results: unknown[] = [];
      for (const sql of ['SELECT ?::int AS one', 'SELECT ?::int AS two'])
        results.push((await session.raw(sql, [1]).options({ rowMode: 'array' })).rows);
      const types = { getTypeParser: () => (value: string) => `of its own: ${value}` };
      results.push((await session.raw('SELECT 3 AS three').options({ types })).rows);
      return results;
    }, options);
    expect(rows).toEqual([[[1]], [[1]], [{ three: 'of its own: 3' }]]);
  });
});
