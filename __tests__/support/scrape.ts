import { get } from './http';

/** What a target tells Prometheus: the values by the names of their series, labels included. */
export async function scrape(url: string): Promise<Record<string, number>> {
  const { status, headers, body } = await get(`${url}/metrics`);
  expect([status, headers['content-type']]).toEqual([200, 'text/plain; version=0.0.4; charset=utf-8']);
  const lines = body.split('\n').filter((line) => line !== '' && !line.startsWith('#'));
  return Object.fromEntries(
    lines.map((line) => {
      const [, series = '', value] = /^([a-z_]+(?:\{.*\})?) (\S+)$/.exec(line) ?? [];
      expect([line, Number.isFinite(Number(value))]).toEqual([line, true]);
      return [series, Number(value)];
    }),
  );
}

/** Without those that are 0: a counter without labels begins with it. @param name of the series, from its beginning */
export function startingWith(name: string, series: Record<string, number>): Record<string, number> {
  return Object.fromEntries(Object.entries(series).filter(([key, value]) => key.startsWith(name) && value !== 0));
}
