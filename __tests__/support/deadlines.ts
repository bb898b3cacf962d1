import type { ErrorRequestHandler, Express, RequestHandler } from 'express';
import { SessionError, type SessionMiddleware, type SessionOptions, sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { type Answer, get, type Listening, type RequestOptions } from './http';
import { answerErrors, express5Flavour, type Flavour, type Handler, type Ledger } from './ledger';

export interface Site extends Listening {
  /** What reached the application's error handler, in order. */
  errors: any[];
  /** What reached `onError`, in order. */
  reported: any[];
  sessions: SessionMiddleware;
  /** Asks for `/`. A request that hangs fails its test, and none after it. */
  get(options?: RequestOptions): Promise<Answer>;
}

export interface SiteOptions extends SessionOptions {
  flavour?: Flavour;
  knex?: Knex;
  /** In place of sessionErrorHandler() and an error handler that answers with the code. */
  errorHandlers?: (errors: any[]) => ErrorRequestHandler[];
}

const sites: Site[] = [];
// Hazard 23, in every test that opens a site.
afterEach(() => {
  for (const { errors, reported } of sites.splice(0)) expectNothingTold(...errors, ...reported);
});

/** One handler for every path, or the routes of an app, behind the session. */
export async function openSite(
  ledger: Ledger,
  handler: Handler | { routes(app: Express): void },
  options: SiteOptions = {},
): Promise<Site> {
  const { flavour = express5Flavour, knex = ledger.knex, errorHandlers, ...sessionOptions } = options;
  const errors: any[] = [];
  const reported: any[] = [];
  const sessions = sessionMiddleware(knex, { onError: (error) => reported.push(error), ...sessionOptions });
  const app = flavour.express();
  app.use(sessions);
  // Async, since a Knex builder is no promise.
  if (typeof handler === 'function') app.use(flavour.route(async (req, res, next) => handler(req, res, next)) as RequestHandler);
  else handler.routes(app);
  const after = errorHandlers?.(errors) ?? [sessionErrorHandler(), answerErrors(errors)];
  for (const each of after) app.use(each);
  const listening = await ledger.listen(app);
  const site: Site = Object.assign(listening, {
    errors,
    reported,
    sessions,
    get: (requestOptions?: RequestOptions) => get(listening.url, { signal: AbortSignal.timeout(4_000), ...requestOptions }),
  });
  sites.push(site);
  return site;
}

declare const realProcess: NodeJS.Process;

/** How many timers keep the process alive. */
export const timers = (): number => realProcess.getActiveResourcesInfo().filter((name) => name === 'Timeout').length;

export const never = (): Promise<never> => new Promise(() => {});

/** The error of a promise that rejects; one that does not settle in time fails the test, and does not hang it. */
export async function rejection(promise: PromiseLike<unknown>): Promise<any> {
  const late = Symbol('late');
  const settled = Promise.resolve(promise).then(
    (value) => ({ value }),
    (error: unknown) => ({ error }),
  );
  const result = await Promise.race([settled, new Promise<typeof late>((resolve) => setTimeout(resolve, 4_000, late).unref())]);
  if (result === late) throw new Error('The promise has not settled.');
  if ('value' in result) throw new Error(`The promise did not reject, but gave ${String(result.value)}.`);
  return result.error;
}

/** Fails if the message of a SessionError, anywhere in these errors and their causes, shows SQL, or a value: those of the tests are 'secret'. */
export function expectNothingTold(...errors: unknown[]): void {
  const seen = new Set<unknown>();
  for (let at of errors) {
    for (; at instanceof Error && !seen.has(at); at = at.cause) {
      seen.add(at);
      if (at instanceof SessionError) expect(at.message).not.toMatch(/\bselect\b|insert into|pg_sleep|"notes"|secret/i);
    }
  }
}
