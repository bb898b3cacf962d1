import { randomUUID } from 'node:crypto';
import { ALICE, BOB } from './seed';

/** What to try first. The id of the transfer is new on each start, so that pasting the line once moves money once. */
export function welcome(port: number): string {
  const url = `http://localhost:${port}`;
  const transfer = (amount: number) =>
    `curl -i ${url}/transfers -H 'content-type: application/json' -d '${JSON.stringify({ id: randomUUID(), from: ALICE, to: BOB, amount })}'`;

  return `Open ${url} in a browser: buttons send requests, and the page shows what becomes of each.

Or without one:

Move 5.00 from Alice to Bob (again: the same transfer, moved once):
  ${transfer(500)}

Move more than Alice has (refused by a constraint at COMMIT, nothing is stored):
  ${transfer(100_000_000)}

What Alice's account says, as CSV:
  curl -i ${url}/accounts/${ALICE}/statement.csv

Ctrl-C stops it.
`;
}
