import { CONNECTIONS, type Figures, type Measured, type Skipped } from './comparison';
import { figuresOf, ratios, type Target, targetsOf } from './comparison-report';
import { contestants, type RouteName, routeNames, routes } from './contestants';
import { median, round, type Summary, summarize } from './statistics';

/** What results.json holds of the comparison: medians and middle halves of the rounds. */
export interface ComparisonResults {
  date: string;
  rounds: number;
  connections: number;
  routes: Record<RouteName, RouteResults>;
  targets: Target[];
}

export interface RouteResults {
  title: string;
  /** In each round. */
  requests: number;
  /** Whom the ratios compare with. */
  base: string;
  contestants: Record<string, ({ label: string } & Skipped) | ContestantResults>;
}

export interface ContestantResults {
  label: string;
  cpuUs: Summary;
  cpuRatio?: Summary;
  requestsPerSecond: Summary;
  requestsRatio?: Summary;
  p50Ms: number;
  p99Ms: number;
  roundTrips: number;
  heldMs: number;
}

export function resultsOf(measured: Measured, rounds: number): ComparisonResults {
  return {
    date: new Date().toISOString().slice(0, 10),
    rounds,
    connections: CONNECTIONS,
    routes: Object.fromEntries(routeNames.map((route) => [route, resultsOfRoute(route, measured)])) as ComparisonResults['routes'],
    targets: targetsOf(measured).map((target) => ({ ...target, value: target.value && round(target.value, 3) })),
  };
}

function resultsOfRoute(route: RouteName, measured: Measured): RouteResults {
  const { title, requests, base } = routes[route];
  const baseFigures = figuresOf(measured, route, base);
  const all = Object.entries(measured[route]).map(([name, figures]) => {
    const label = contestants[name]?.label ?? name;
    return [name, 'skipped' in figures ? { label, ...figures } : { label, ...resultsOfContestant(figures, baseFigures) }];
  });
  return { title, requests, base, contestants: Object.fromEntries(all) };
}

function resultsOfContestant(figures: Figures, base: Figures | undefined): Omit<ContestantResults, 'label'> {
  return {
    cpuUs: summarize(figures.cpu),
    ...(base && { cpuRatio: summarize(ratios(figures.cpu, base.cpu), 3) }),
    requestsPerSecond: summarize(figures.perSecond),
    ...(base && { requestsRatio: summarize(ratios(figures.perSecond, base.perSecond), 3) }),
    p50Ms: round(median(figures.p50), 2),
    p99Ms: round(median(figures.p99), 2),
    roundTrips: figures.roundTrips,
    heldMs: round(median(figures.heldMs), 3),
  };
}
