export const routes = {
  untouched: { title: 'Untouched: no statement', method: 'GET', path: '/untouched', requests: 6_000, base: 'nothing' },
  select: { title: 'One SELECT by key', method: 'GET', path: '/select/:id', requests: 2_000, base: 'by-hand' },
  insert: { title: 'SELECT + INSERT', method: 'POST', path: '/insert/:id', requests: 1_500, base: 'by-hand' },
  ten: { title: 'Ten statements, one after the other', method: 'GET', path: '/ten/:id', requests: 400, base: 'by-hand' },
  all: { title: 'Promise.all of ten', method: 'GET', path: '/all/:id', requests: 400, base: 'by-hand' },
  stream: { title: 'A stream of 10,000 rows', method: 'GET', path: '/stream', requests: 20, base: 'by-hand' },
} as const;
export type RouteName = keyof typeof routes;
export const routeNames = Object.keys(routes) as RouteName[];

export interface Contestant {
  label: string;
  /** The file in apps/, and what it is started with. */
  app: string;
  settings?: object;
  /** The routes that it does not run, and why. */
  without: Partial<Record<RouteName, string>>;
}

const noDatabase = 'no database';
const bare = { select: noDatabase, insert: noDatabase, ten: noDatabase, all: noDatabase, stream: noDatabase };
const noMiddleware = { untouched: 'no middleware: as the first line' };

/** The order is that of the report. */
export const contestants: Record<string, Contestant> = {
  none: { label: 'no middleware', app: 'bare', settings: { middleware: 'none' }, without: bare },
  nothing: { label: 'a middleware that does nothing', app: 'bare', settings: { middleware: 'nothing' }, without: bare },
  session: { label: 'session', app: 'session', without: {} },
  'session-end': { label: "session, commitAt: 'end'", app: 'session', settings: { options: { commitAt: 'end' } }, without: {} },
  'session-finish': { label: "session, commitAt: 'finish'", app: 'session', settings: { options: { commitAt: 'finish' } }, without: {} },
  'session-pipeline': {
    label: 'session, pipeline: true',
    app: 'session',
    settings: { connection: { pipeline: true } },
    without: { stream: 'pg refuses a cursor in pipeline mode' },
  },
  'session-read-only': {
    label: 'session, readOnly: true',
    app: 'session',
    settings: { options: { readOnly: true } },
    without: { insert: 'a read-only transaction refuses INSERT' },
  },
  'session-autocommit': {
    label: 'session, transaction: false',
    app: 'session',
    settings: { options: { transaction: false } },
    without: {},
  },
  knex: { label: 'knex without a transaction', app: 'knex', without: noMiddleware },
  'by-hand': { label: 'knex.transaction() by hand', app: 'by-hand', without: noMiddleware },
  eager: { label: 'eager middleware', app: 'eager', without: {} },
  pg: { label: 'pg, BEGIN and COMMIT by hand', app: 'pg', without: noMiddleware },
  'postgres-js': { label: 'postgres.js, sql.begin()', app: 'postgres-js', without: noMiddleware },
  fastify: { label: 'Fastify, @fastify/postgres', app: 'fastify', without: {} },
};

/** Those whose code is in bench/node_modules. */
export const peers: readonly string[] = ['postgres-js', 'fastify'];
