import type { ComparisonResults, ContestantResults } from './comparison-results';
import { contestants, type RouteName, routes } from './contestants';
import { format } from './statistics';

const columns: Partial<Record<RouteName, string>> = {
  select: 'one SELECT',
  insert: 'SELECT + INSERT',
  ten: 'ten statements',
  all: '`Promise.all` of ten',
  stream: '10,000 rows',
};

/** The tables of the README, from what results.json holds. */
export function markdownOf(results: ComparisonResults): string {
  return [ratioTable(results), targetTable(results)].join('\n\n');
}

/** CPU against knex.transaction() by hand, and what one SELECT does on the wire. */
export function ratioTable(results: ComparisonResults): string {
  const head = [...Object.values(columns), 'round trips, one SELECT', 'connection held, one SELECT'];
  const names = Object.keys(contestants).filter((name) => figuresOf(results, 'select', name));
  const rows = names.map((name) => {
    const ratios = (Object.keys(columns) as RouteName[]).map((route) => {
      const figures = figuresOf(results, route, name);
      return figures?.cpuRatio ? format(figures.cpuRatio.median, 2) : '-';
    });
    const { roundTrips, heldMs } = figuresOf(results, 'select', name) as ContestantResults;
    return row([contestants[name]?.label ?? name, ...ratios, format(roundTrips), `${format(heldMs, 2)} ms`]);
  });
  return [row(['CPU, `knex.transaction()` by hand = 1', ...head]), row(['---', ...head.map(() => '---:')]), ...rows].join('\n');
}

export function targetTable({ targets }: ComparisonResults): string {
  const rows = targets.map(({ route, what, value, bound, isMinimum }) =>
    row([
      routes[route].title,
      what,
      value === undefined ? '-' : format(value, 2),
      `${isMinimum ? 'at least' : 'at most'} ${format(bound, Number.isInteger(bound) ? 0 : 2)}`,
    ]),
  );
  return [row(['route', 'what', 'measured', 'target']), row(['---', '---', '---:', '---']), ...rows].join('\n');
}

function figuresOf(results: ComparisonResults, route: RouteName, name: string): ContestantResults | undefined {
  const figures = results.routes[route].contestants[name];
  return figures && !('skipped' in figures) ? figures : undefined;
}

function row(cells: string[]): string {
  return `| ${cells.join(' | ')} |`;
}
