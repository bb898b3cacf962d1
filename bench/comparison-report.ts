import type { Figures, Measured, Skipped } from './comparison';
import { contestants, type RouteName, routes } from './contestants';
import { format, median, summary } from './statistics';

export function reportComparison(measured: Measured, chosen: readonly RouteName[], only: readonly string[], rounds: number): string {
  const parts = chosen.map((route) => reportRoute(route, measured, only));
  return [`Medians (and middle halves) of the rounds (${rounds}); ratios are those within a round`, ...parts].join('\n\n');
}

function reportRoute(route: RouteName, measured: Measured, only: readonly string[]): string {
  const { title, base } = routes[route];
  const baseFigures = figuresOf(measured, route, base);
  const versus = baseFigures ? contestants[base]?.label : undefined;
  const head = ['CPU us per request', versus ? 'ratio' : '', 'req/s', 'p50 ms', 'p99 ms', 'round trips', 'held ms'];
  const lines = only.map((name) => {
    const figures = measured[route][name] as Figures | Skipped;
    const label = `  ${contestants[name]?.label}`.padEnd(34);
    if ('skipped' in figures) return `${label}${'-'.padStart(widths[0] as number)}   ${figures.skipped}`;
    const columns = [
      summary(figures.cpu),
      baseFigures ? ratioSummary(figures.cpu, baseFigures.cpu) : '',
      format(median(figures.perSecond)),
      format(median(figures.p50), 1),
      format(median(figures.p99), 1),
      format(figures.roundTrips, figures.roundTrips < 20 && !Number.isInteger(figures.roundTrips) ? 2 : 0),
      format(median(figures.heldMs), 2),
    ];
    return label + row(columns);
  });
  return [`${title}${versus ? `; ratio: CPU against ${versus}` : ''}`, ' '.repeat(34) + row(head), ...lines].join('\n');
}

const widths = [22, 20, 9, 8, 8, 13, 9];

function row(columns: string[]): string {
  return columns.map((column, i) => column.padStart(widths[i] as number)).join('');
}

function ratioSummary(values: number[], base: number[]): string {
  return summary(ratios(values, base), 2);
}

/** Within a round: the machine's mood of that moment is in both figures. */
export function ratios(values: readonly number[], base: readonly number[]): number[] {
  return values.map((value, i) => value / (base[i] as number));
}

export function figuresOf(measured: Measured, route: RouteName, name: string): Figures | undefined {
  const figures = measured[route][name];
  return figures && !('skipped' in figures) ? figures : undefined;
}

export interface Target {
  route: RouteName;
  what: string;
  /** Undefined where it was not measured. */
  value: number | undefined;
  bound: number;
  isMinimum?: boolean | undefined;
}

/** What the package is to reach. */
export function targetsOf(measured: Measured): Target[] {
  const against = (route: RouteName, base: string, figure: 'cpu' | 'perSecond'): number | undefined => {
    const [own, other] = ['session', base].map((name) => figuresOf(measured, route, name));
    return own && other && median(ratios(own[figure], other[figure]));
  };
  const cpu = (route: RouteName, base: string, bound: number): Target => ({
    route,
    what: `CPU against ${contestants[base]?.label}`,
    value: against(route, base, 'cpu'),
    bound,
  });
  const roundTrips = (route: RouteName, name: string): Target => ({
    route,
    what: `round trips, ${contestants[name]?.label}`,
    value: figuresOf(measured, route, name)?.roundTrips,
    bound: 2,
  });
  return [
    cpu('untouched', 'nothing', 1.03),
    cpu('select', 'by-hand', 0.65),
    cpu('select', 'pg', 1.15),
    cpu('insert', 'by-hand', 0.67),
    cpu('insert', 'pg', 1.18),
    cpu('ten', 'knex', 1.1),
    {
      route: 'select',
      what: `requests per second against ${contestants['by-hand']?.label}`,
      value: against('select', 'by-hand', 'perSecond'),
      bound: 1.3,
      isMinimum: true,
    },
    roundTrips('select', 'session'),
    roundTrips('all', 'session-pipeline'),
  ];
}

export function reportTargets(measured: Measured): string {
  const lines = targetsOf(measured)
    .filter(({ value }) => value !== undefined)
    .map(({ route, what, value = 0, bound, isMinimum }) => {
      const isReached = isMinimum ? value >= bound : value <= bound;
      const limit = `at ${isMinimum ? 'least' : 'most'} ${format(bound, 2)}`;
      return `  ${routes[route].title.padEnd(38)}${what.padEnd(58)}${format(value, 2).padStart(6)}   ${limit}   ${isReached ? 'ok' : 'not ok'}`;
    });
  return lines.length === 0 ? '' : ['\nTargets', ...lines].join('\n');
}
