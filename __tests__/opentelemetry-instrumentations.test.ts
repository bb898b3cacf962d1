import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { SpanKind } from '@opentelemetry/api';
import { createDatabase, type TestDatabase } from './support/database';
import type { TracedRun, TracedSpan, TracedStage } from './support/traced';
import { root } from './support/typescript';

const PATHS: TracedStage['paths'] = [
  '/2/two/201',
  '/2/rejected/409',
  '/1/one/201',
  '/0/none/200',
  '/twice/same',
  '/1/last/201',
  ['/1/at once a/201', '/2/at once b/409', '/3/at once c/201'].map(encodeURI),
];
const ANSWERS = [201, 409, 201, 200, 500, 201, 201, 409, 201];
const STORED = ['at once a 0', 'at once c 0', 'at once c 1', 'at once c 2', 'last 0', 'one 0', 'two 0', 'two 1'];
const OURS = 'express-knex-session';

/** With the real instrumentations of HTTP, Express, pg and Knex, in a process of its own. */
const stages: (Pick<TracedStage, 'pgInstrumentation'> & { name: string; connection?: object })[] = [
  { name: 'the instrumentations as they are', pgInstrumentation: {} },
  { name: 'comments in the statements', pgInstrumentation: { addSqlCommenterCommentToQueries: true } },
  {
    name: 'comments in the statements, in pipeline mode',
    pgInstrumentation: { addSqlCommenterCommentToQueries: true },
    connection: { pipeline: true },
  },
  { name: 'the trace in application_name', pgInstrumentation: { enableTraceContextPropagation: true } },
];
const databases: TestDatabase[] = [];
let runs: TracedRun[];

beforeAll(async () => {
  const given: TracedStage[] = [];
  for (const { pgInstrumentation, connection } of stages) {
    const database = await createDatabase();
    databases.push(database);
    await database.admin.raw('CREATE TABLE notes (id text PRIMARY KEY)');
    given.push({ pgInstrumentation, connection: { ...connection, connectionString: database.url }, paths: PATHS });
  }
  const { stdout } = await promisify(execFile)(
    process.execPath,
    ['--import', 'tsx', '__tests__/support/traced.ts', JSON.stringify(given)],
    { cwd: root, env: { ...process.env, NODE_OPTIONS: '', NODE_ENV: 'production' } },
  );
  runs = JSON.parse(stdout);
});
afterAll(async () => {
  for (const database of databases) await database.drop();
});

describe.each(stages.map(({ name }, index) => ({ name, index })))('with $name', ({ index }) => {
  const database = () => databases[index] as TestDatabase;
  const traced = () => runs[index] as TracedRun;

  /** The spans of each request, in the order of the requests. */
  const requests = (): TracedSpan[][] => {
    const roots = traced()
      .spans.filter(({ kind }) => kind === SpanKind.SERVER)
      .sort((a, b) => a.from - b.from);
    return roots.map(({ trace }) => traced().spans.filter((span) => span.trace === trace));
  };
  const by = (spans: TracedSpan[], name: string, start = '') => spans.filter((span) => span.by === name && span.name.startsWith(start));
  const ended = (spans: TracedSpan[]) => by(spans, OURS).map(({ attributes }) => attributes[`express_knex_session.outcome`]);

  it('stores what is to be stored, and nothing else', async () => {
    expect(traced().answers).toEqual(ANSWERS);
    expect(await database().admin('notes').orderBy('id').pluck('id')).toEqual(STORED);
  });

  it('makes one trace of each request, and one span of its transaction in it', () => {
    expect(requests()).toHaveLength(ANSWERS.length);
    expect(requests().slice(0, 6).map(ended)).toEqual([['committed'], ['rolled back'], ['committed'], [], ['rolled back'], ['committed']]);
    expect(requests().flatMap(ended)).toHaveLength(ANSWERS.length - 1);
    expect(by(traced().spans, OURS, 'transaction test_')).toHaveLength(ANSWERS.length - 1);
    expect(by(traced().spans, OURS).map(({ hasFailed }) => hasFailed)).toEqual([false, false, false, true, ...Array(4).fill(false)]);
  });

  it('has the transaction under the span of the request', () => {
    for (const spans of requests()) {
      for (const transaction of by(spans, OURS)) {
        let above: TracedSpan | undefined = transaction;
        const seen = [];
        while (above) {
          seen.push(above.by);
          above = spans.find(({ id }) => id === above?.parent);
        }
        expect(seen).toEqual([OURS, 'express', 'http']);
      }
    }
  });

  it('leaves each statement its spans, beside the transaction and in its time; BEGIN has none, for it goes with the first', () => {
    for (const spans of requests()) {
      for (const transaction of by(spans, OURS)) {
        const ofKnex = by(spans, 'knex', 'insert ');
        const ofPg = by(spans, 'pg', 'pg.query:INSERT ');
        expect(ofKnex.map(({ parent }) => parent)).toEqual(
          Array(transaction.attributes['express_knex_session.statements']).fill(transaction.parent),
        );
        expect(ofPg.map(({ parent }) => parent).sort()).toEqual(ofKnex.map(({ id }) => id).sort());
        const ends = by(spans, 'pg', 'pg.query:').filter(({ name }) => /COMMIT|ROLLBACK/.test(name));
        expect(ends.map(({ parent }) => parent)).toEqual([transaction.parent]);
        expect(by(spans, 'pg', 'pg.query:BEGIN')).toEqual([]);
        for (const { from, until } of [...ofKnex, ...ofPg, ...ends]) {
          // The clocks of two spans are not quite the same.
          expect(from).toBeGreaterThan(transaction.from - 2);
          expect(until).toBeLessThan(transaction.until + 2);
        }
      }
    }
  });

  it('names the server as pg does', () => {
    const names = ['db.system.name', 'db.namespace', 'server.address', 'server.port'];
    const serverOf = ({ attributes }: TracedSpan) => names.map((name) => attributes[name]);
    const [ofPg] = by(traced().spans, 'pg', 'pg.query:INSERT');
    for (const span of by(traced().spans, OURS)) expect(serverOf(span)).toEqual(serverOf(ofPg as TracedSpan));
  });
});
