import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Chart, drawBars } from './charts/bars';
import type { ComparisonResults, ContestantResults } from './comparison-results';
import { contestants, type RouteName } from './contestants';
import { format } from './statistics';

const FOLDER = join(__dirname, 'charts');
const statementRoutes: RouteName[] = ['select', 'insert', 'ten'];
const compared = ['session', 'by-hand', 'eager', 'knex', 'pg', 'postgres-js', 'fastify'];
const onTheWire = ['session', 'session-pipeline', 'session-autocommit', 'by-hand', 'pg', 'postgres-js'];

/** For GitHub's light and dark themes. */
export function drawCharts(results: ComparisonResults): string[] {
  const charts: Record<string, Chart> = {
    cpu: {
      title: 'CPU time of the server process per request',
      subtitle: `Microseconds, medians of ${results.rounds} rounds; shorter is better. In brackets: against knex.transaction() by hand.`,
      panels: panelsOf(results, statementRoutes, compared, (figures) => ({
        value: figures.cpuUs.median,
        text: `${format(figures.cpuUs.median)}${inBrackets(figures.cpuRatio)}`,
      })),
    },
    requests: {
      title: 'Requests per second of one server process',
      subtitle: `${results.connections} clients, a pool of ${results.connections}, medians of ${results.rounds} rounds; longer is better. In brackets: against knex.transaction() by hand.`,
      panels: panelsOf(results, statementRoutes, compared, (figures) => ({
        value: figures.requestsPerSecond.median,
        text: `${format(figures.requestsPerSecond.median)}${inBrackets(figures.requestsRatio)}`,
      })),
    },
    'round-trips': {
      title: 'Round trips to the database per request',
      subtitle: 'Counted on the wire, BEGIN and COMMIT included; fewer is better.',
      panels: panelsOf(results, ['select', 'insert', 'all'], onTheWire, ({ roundTrips }) => ({
        value: roundTrips,
        text: format(roundTrips, Number.isInteger(roundTrips) ? 0 : 1),
      })),
    },
  };
  mkdirSync(FOLDER, { recursive: true });
  const files: string[] = [];
  for (const [name, chart] of Object.entries(charts)) {
    for (const theme of ['light', 'dark'] as const) {
      const file = `${name}-${theme}.svg`;
      writeFileSync(join(FOLDER, file), `${drawBars(chart, theme)}\n`);
      files.push(`bench/charts/${file}`);
    }
  }
  return files;
}

function panelsOf(
  results: ComparisonResults,
  routeNames: readonly RouteName[],
  names: readonly string[],
  barOf: (figures: ContestantResults) => { value: number; text: string },
): Chart['panels'] {
  return routeNames.map((route) => ({
    title: results.routes[route].title,
    bars: names.map((name) => {
      const figures = results.routes[route].contestants[name];
      const isOurs = contestants[name]?.app === 'session';
      const bar = figures && !('skipped' in figures) ? barOf(figures) : { value: 0, text: '-' };
      return { label: labelOf(name), isOurs, ...bar };
    }),
  }));
}

function labelOf(name: string): string {
  const label = contestants[name]?.label ?? name;
  return label.replace(/^session/, 'this package');
}

function inBrackets(ratio: ContestantResults['cpuRatio']): string {
  return ratio ? ` (${format(ratio.median, 2)})` : '';
}
