import { type Measured, measureComparison, type Selection } from './comparison';
import { reportComparison, reportTargets } from './comparison-report';
import { contestants, type RouteName, routeNames } from './contestants';

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

export async function compare(url: string, selection: Selection): Promise<Measured> {
  const measured = await measureComparison(url, selection);
  console.log(reportComparison(measured, selection.routes, selection.only, selection.rounds));
  console.log(`\n${reportTargets(measured)}`);
  return measured;
}
