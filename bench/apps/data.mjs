/* What every app does in the same way. */

/** As many connections for everyone; none is closed while the others have their turn. */
export const POOL_SIZE = 10;
export const knexPool = { min: 0, max: POOL_SIZE, idleTimeoutMillis: 3_600_000 };
export const pgPool = { max: POOL_SIZE, idleTimeoutMillis: 0 };

/** The ten keys of a request for ten. @param {string | string[] | undefined} id @returns {number[]} */
export function tenFrom(id) {
  return Array.from({ length: 10 }, (_, i) => Number(id) + i);
}

/** @param {AsyncIterable<object>} rows */
export async function* toLines(rows) {
  for await (const row of rows) yield `${JSON.stringify(row)}\n`;
}
