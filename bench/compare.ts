import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { drawCharts } from './charts';
import { measureComparison, type Selection } from './comparison';
import { reportComparison, reportTargets } from './comparison-report';
import { type ComparisonResults, resultsOf } from './comparison-results';
import { contestants, type RouteName, routeNames } from './contestants';
import { markdownOf } from './markdown';
import { versionOf } from './peers';
import { writeResults } from './result-file';

/** `--routes=select,insert`, `--only=session,by-hand`; all that is not named. */
export function partsOf(args: readonly string[]): Pick<Selection, 'routes' | 'only'> {
  const chosen = { routes: routeNames as readonly string[], only: Object.keys(contestants) as readonly string[] };
  for (const arg of args) {
    const [, option, list] = /^--(routes|only)=(.+)$/.exec(arg) ?? [];
    if (!option || !list) throw new TypeError(`Expected --routes=... or --only=..., got ${arg}.`);
    const known = chosen[option as keyof typeof chosen];
    const names = list.split(',');
    const unknown = names.find((name) => !known.includes(name));
    if (unknown) throw new TypeError(`Expected --${option} to name some of ${known.join(', ')}; got ${unknown}.`);
    chosen[option as keyof typeof chosen] = known.filter((name) => names.includes(name));
  }
  return chosen as { routes: RouteName[]; only: string[] };
}

/** Prints the comparison; one of everything, with enough rounds, is also written down. */
export async function compare(url: string, selection: Selection): Promise<void> {
  const { rounds, routes, only } = selection;
  const measured = await measureComparison(url, selection);
  console.log(reportComparison(measured, routes, only, rounds));
  console.log(reportTargets(measured));
  if (rounds < LEAST_ROUNDS || routes.length < routeNames.length || only.length < Object.keys(contestants).length) {
    console.log(`\nA part, or fewer than ${LEAST_ROUNDS} rounds: ${FILE} is left as it is.`);
    return;
  }
  const peers = Object.fromEntries(PEERS.map((name) => [name, versionOf(name)]));
  await writeResults(FILE, url, resultsOf(measured, rounds), peers);
  console.log(`\nWritten: bench/${FILE}, ${drawCharts(readResults()).join(', ')}`);
}

/** The charts again, and the tables of the README. */
export function redraw(): string {
  const results = readResults();
  return [...drawCharts(results), '', markdownOf(results)].join('\n');
}

function readResults(): ComparisonResults {
  return JSON.parse(readFileSync(join(__dirname, FILE), 'utf8'));
}

const FILE = 'results.json';
const LEAST_ROUNDS = 7;
const PEERS = ['fastify', '@fastify/postgres', 'postgres', 'pg-query-stream'];
