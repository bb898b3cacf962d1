import type { Knex } from 'knex';
import { Client, types } from 'pg';
import { StartError } from './settings';

const connectionTimeoutMillis = 5_000;

/** Cents are `bigint` from the database to the response: a number loses digits above 2^53. */
export function configFor(url: string): Knex.Config {
  const connection = { connectionString: url, connectionTimeoutMillis, application_name: 'ledger', types: { getTypeParser } };
  return {
    client: 'pg',
    connection: connection as Knex.PgConnectionConfig,
    pool: { min: 0, max: 5 }, // Few, so that the live page has something to show.
    // Of each connection that it lost or did not get, with a stack. Whoever needed it gets an error, which is logged where it is answered.
    log: { warn() {} },
  };
}

const getTypeParser: typeof types.getTypeParser = (type, format) =>
  type === types.builtins.INT8 ? BigInt : types.getTypeParser(type, format);

/** Connects once, without a pool: a pool logs each failure with its stack before it gives up. */
export async function assertReachable(url: string): Promise<void> {
  try {
    const client = new Client({ connectionString: url, connectionTimeoutMillis });
    client.on('error', () => {}); // The end of a connection that was refused half-way; connect() has rejected already.
    await client.connect();
    await client.end();
  } catch (error) {
    const { message, code } = error as NodeJS.ErrnoException;
    throw new StartError(
      `Cannot connect to the database: ${message || code}. Start it, correct DATABASE_URL, or unset it: then the app starts its own PostgreSQL.`,
    );
  }
}
