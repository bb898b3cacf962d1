import { Child } from './child';
import { format, median, summary } from './statistics';

type Figures = Record<'nothing' | 'property' | 'session', number>;

/** What the middleware adds to a request that never touches its session, against a middleware that does nothing. */
export async function measureNeverUsed({ rounds, profileFolder }: { rounds: number; profileFolder?: string | undefined }): Promise<string> {
  const child = new Child('unused-session.mjs', [], { execArgv: ['--expose-gc'], profileFolder });
  const times: Figures[] = [];
  const bytes: Figures[] = [];
  for (let i = 0; i < 3; i++) await child.ask('time');
  for (let i = 0; i < rounds; i++) times.push(await child.ask<Figures>('time'));
  for (let i = 0; i < 3; i++) bytes.push(await child.ask<Figures>('bytes'));
  await child.stop();

  const more = (figures: Figures[], name: keyof Figures, than: keyof Figures) => figures.map((figure) => figure[name] - figure[than]);
  return [
    `A session that is never used: what it adds to a request, median (and middle half) of ${rounds} rounds`,
    `  against a middleware that does nothing              ${summary(more(times, 'session', 'nothing'), 2)} us, ${format(median(more(bytes, 'session', 'nothing')))} bytes`,
    `  against one that sets one property of the request   ${summary(more(times, 'session', 'property'), 2)} us, ${format(median(more(bytes, 'session', 'property')))} bytes`,
  ].join('\n');
}
