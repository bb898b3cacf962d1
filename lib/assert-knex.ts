import type { Knex } from 'knex';
import { describe } from './describe';

/**
 * Checks what a session is to be made of.
 *
 * @throws TypeError that says what was given instead, and what was probably meant
 */
export function assertKnex(knex: unknown, expected = '`knex` to be a Knex instance'): asserts knex is Knex {
  const client = (knex as Partial<Knex> | null | undefined)?.client;
  if (typeof knex !== 'function' || typeof client?.acquireConnection !== 'function') {
    throw new TypeError(`Expected ${expected}, got ${mistaken(knex)}`);
  }
  if (client.dialect !== 'postgresql' || client.driverName !== 'pg') {
    const name = typeof client.config?.client === 'string' ? client.config.client : (client.driverName ?? client.dialect);
    throw new TypeError(
      `Expected a Knex instance with \`client: 'pg'\`, got one with '${name}'. Only PostgreSQL with the driver pg is supported.`,
    );
  }
}

/** Completes "got ...": what it is, and the remedy. A string is not shown: it is a connection URL, with a password in it. */
function mistaken(knex: unknown): string {
  const make = "knex({ client: 'pg', connection: ... })";
  if (typeof knex === 'string') return `a string. Make an instance of it: ${make}.`;
  if (typeof knex === 'function') return `${describe(knex)}. Is it the function that makes instances? Call it: ${make}.`;
  const { httpVersion, client, toSQL, then, totalCount } = (knex ?? {}) as Record<string, unknown>;
  if (httpVersion !== undefined) return `${describe(knex)}. Did you mean app.use(sessionMiddleware(knex))?`;
  if (typeof toSQL === 'function') return 'a query. Pass knex itself.';
  if (typeof then === 'function') return 'a promise. Await it first.';
  if (typeof totalCount === 'number') return "a pg.Pool. Give it to Knex: knex({ client: 'pg', connectionPool: pool }).";
  if (client !== undefined) return 'its configuration. Make the instance once, and share it: knex(config).';
  return `${describe(knex)}. Make one: ${make}.`;
}
