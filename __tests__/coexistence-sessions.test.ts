import express, { type ErrorRequestHandler, type Express, type Request } from 'express';
import { sessionMiddleware } from 'express-knex-session';
import type { Knex } from 'knex';
import { type AppOptions, deferred, type Handler, REFUSED, useGatedApps } from './support/gated-app';
import { get, RawClient } from './support/http';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

type Package = typeof import('express-knex-session');

/** Another copy of the package, as two versions of a dependency would bring. */
function secondCopy(): Package {
  let copy: Package | undefined;
  jest.isolateModules(() => {
    copy = require('express-knex-session') as Package;
  });
  if (!copy) throw new Error('There is no second copy.');
  return copy;
}

const apps = useGatedApps();
const others = useGatedApps();
const reported: unknown[] = [];
afterEach(() => {
  reported.length = 0;
});

type WithOther = Request & { other: Knex.Transaction };

const packages: Record<string, () => Package> = {
  'of one package': () => jest.requireActual<Package>('express-knex-session'),
  'of two copies of the package': secondCopy,
};

/** Our session on `req.session`, one on another database on `req.other`. */
function serve(load: () => Package, handler: Handler, otherOptions: object = {}, options: AppOptions = {}) {
  const other = load().sessionMiddleware(others.knex, { property: 'other', onError: (error) => reported.push(error), ...otherOptions });
  return apps.gated(handler, {
    errorHandlers: [(_error, _req, res, _next) => res.status(500).end('refused')],
    ...options,
    after: (app: Express) => app.use(other),
  });
}

const usage = () => [poolUsage(apps.knex).used, poolUsage(others.knex).used];

describe.each(Object.keys(packages))('when a request has two sessions %s', (name) => {
  const load = packages[name] as () => Package;
  /** /OURS/OTHERS: the names to insert; "-" does not use that session. */
  const insertBoth: Handler = async (req, res) => {
    const [, ours = '', theirs = ''] = req.path.split('/');
    if (ours !== '-') await req.session('entries').insert({ name: ours });
    if (theirs !== '-') await (req as WithOther).other('entries').insert({ name: theirs });
    if (req.query['in'] === 'parts') {
      res.status(201).write('o');
      res.end('k');
    } else res.status(Number(req.query['status'] ?? 201)).send('ok');
  };

  it.each([
    ['/a/b', 201, ['a'], ['b']],
    ['/a/b?in=parts', 201, ['a'], ['b']],
    ['/a/-', 201, ['a'], []],
    ['/-/b', 201, [], ['b']],
    ['/-/-', 201, [], []],
    ['/a/b?status=400', 400, [], []],
  ])('settles both before the response leaves: %s (35)', async (path, status, ours, theirs) => {
    const { url } = await serve(load, insertBoth);
    expect(await get(url + path)).toMatchObject({ status, body: 'ok', complete: true });
    expect(usage()).toEqual([0, 0]);
    expect([await apps.names(), await others.names()]).toEqual([ours, theirs]);
  });

  it.each([
    ['the first', `/${REFUSED}/b`],
    ['the first, response in parts', `/${REFUSED}/b?in=parts`],
    ['the second', `/a/${REFUSED}`],
    ['the second, response in parts', `/a/${REFUSED}?in=parts`],
    ['both', `/${REFUSED}/${REFUSED}`],
  ])('never tells of a success if a COMMIT fails: %s (35)', async (_which, path) => {
    const { url } = await serve(load, insertBoth);
    expect(await get(url + path)).toMatchObject({ status: 500, body: 'refused', complete: true });
    expect(usage()).toEqual([0, 0]);
    expect([...(await apps.names()), ...(await others.names())]).not.toContain(REFUSED);
  });

  it('rolls both back if the handler throws (11)', async () => {
    const { url } = await serve(load, async (req) => {
      await req.session('entries').insert({ name: 'a' });
      await (req as WithOther).other('entries').insert({ name: 'b' });
      throw new Error('no');
    });
    expect(await get(url)).toMatchObject({ status: 500, body: 'refused' });
    expect(usage()).toEqual([0, 0]);
    expect([await apps.names(), await others.names()]).toEqual([[], []]);
  });

  it('rolls both back if the client disconnects', async () => {
    const inserted = deferred();
    const { port } = await serve(load, async (req) => {
      await req.session('entries').insert({ name: 'a' });
      await (req as WithOther).other('entries').insert({ name: 'b' });
      inserted.resolve();
    });
    const client = await RawClient.connect(port);
    client.get('/');
    await inserted.promise;
    await client.reset();
    await eventually(() => expect(usage()).toEqual([0, 0]));
    expect([await apps.names(), await others.names()]).toEqual([[], []]);
  });

  it("lets no byte leave before COMMIT of the one with 'head', though the other one has 'end'", async () => {
    const { url, sockets } = await serve(load, insertBoth, { commitAt: 'end' });
    const hold = apps.hold();
    const answer = get(`${url}/a/b?in=parts`);
    await hold.reached;
    expect(sockets[0]?.bytesWritten).toBe(0);
    hold.release();
    expect(await answer).toMatchObject({ status: 201, body: 'ok', complete: true });
    expect([await apps.names(), await others.names()]).toEqual([['a'], ['b']]);
  });

  it('cuts the connection if the second one fails after bytes have left', async () => {
    const { url } = await serve(load, insertBoth, { commitAt: 'end' }, { commitAt: 'end' });
    const answer = await get(`${url}/a/${REFUSED}?in=parts`);
    expect(answer).toMatchObject({ complete: false });
    await eventually(() => expect(usage()).toEqual([0, 0]));
    expect(await others.names()).toEqual([]);
    expect([...apps.reported, ...reported]).toEqual([expect.objectContaining({ code: '23514' })]);
  });
});

describe('when two copies of the package meet on one request (74)', () => {
  const copy = secondCopy();

  it('is another copy', () => {
    expect(copy.sessionMiddleware).not.toBe(sessionMiddleware);
  });

  it("rolls back by the other copy's sessionErrorHandler", async () => {
    const outcomes: string[] = [];
    const router = express.Router();
    router.use(async (req) => {
      await req.session('entries').insert({ name: 'a' });
      throw new Error('no');
    });
    router.use(copy.sessionErrorHandler());
    router.use(((_error, req, res, _next) => {
      outcomes.push(req.session.outcome);
      res.end('all is well');
    }) as ErrorRequestHandler);
    const { url } = await apps.gated((_req, _res, next) => next(), { after: (app) => app.use(router) });
    expect(await get(url)).toMatchObject({ status: 200, body: 'all is well' });
    expect(outcomes).toEqual(['rolled back']);
    expect(await apps.names()).toEqual([]);
  });

  it("finds the other copy's session by getSession", async () => {
    const { url } = await apps.gated(async (req, res) => {
      const session = copy.getSession(req);
      await session('entries').insert({ name: 'a' });
      res.json(session === req.session);
    });
    expect((await get(url)).body).toBe('true');
    expect(await apps.names()).toEqual(['a']);
  });

  it('has one owner if both are mounted with the same options, and a named error otherwise (34)', async () => {
    const options = { onError: () => {} };
    const handler: Handler = async (req, res) => {
      await req.session('entries').insert({ name: 'a' });
      res.end('ok');
    };
    const same = await apps.gated(handler, { ...options, after: (app) => app.use(copy.sessionMiddleware(apps.knex, options)) });
    expect(await get(same.url)).toMatchObject({ status: 200, body: 'ok' });
    expect(await apps.names()).toEqual(['a']);
    const different = await apps.gated(handler, {
      ...options,
      after: (app) => app.use(copy.sessionMiddleware(apps.knex, { ...options, commitAt: 'end' })),
    });
    const answer = await get(different.url);
    expect(answer).toMatchObject({ status: 500 });
    expect(answer.body).toContain('mounted twice');
  });
});
