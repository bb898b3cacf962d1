import { randomUUID } from 'node:crypto';
import { EventEmitter, once } from 'node:events';
import { createWriteStream } from 'node:fs';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { request as nodeRequest } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { ExampleBench } from './support/example-bench';
import { deferred } from './support/gated-app';
import { post, request } from './support/http';
import { exampleIn } from './support/pages';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

/* Runs the examples of docs/recipes that are about what goes on beside the session: background work, event streams, uploads. */
failOnWarnings();

const bench = ExampleBench.use(`
  CREATE TABLE entries (id serial, account text, amount int NOT NULL);
  CREATE TABLE reports (id serial PRIMARY KEY, state text CHECK (state <> 'bad'), rows jsonb);
  CREATE TABLE files (name text UNIQUE, path text)`);

describe('the recipe of work after the response', () => {
  const code = exampleIn('recipes/background-work', 'queued');

  it('answers first, and works then', async () => {
    await bench.database.admin('entries').insert({ account: 'a', amount: 5 });
    const lock = await bench.database.admin.transaction();
    await lock.raw('LOCK TABLE entries');
    const url = await bench.serve(code);
    expect(await post(`${url}/reports`)).toMatchObject({ status: 202, body: expect.stringContaining('"state":"queued"') });
    await lock.rollback();
    await eventually(async () =>
      expect(await bench.database.admin('reports')).toEqual([{ id: 1, state: 'done', rows: [{ account: 'a', sum: '5' }] }]),
    );
  });

  it('works for no report that is not stored', async () => {
    expect((await post(`${await bench.serve(code.replace('queued', 'bad'))}/reports`)).status).toBe(500);
    expect(await bench.database.admin('reports')).toEqual([]);
  });

  it('tells of work that fails', async () => {
    const failed = deferred<unknown[]>();
    const console = { error: (...told: unknown[]) => failed.resolve(told) };
    const url = await bench.serve(code.replace("state: 'done'", "state: 'bad'"), { console });
    expect((await post(`${url}/reports`)).status).toBe(202);
    expect(await failed.promise).toEqual(['report', expect.any(Number), expect.objectContaining({ code: '23514' })]);
    expect(await bench.database.admin('reports').pluck('state')).toEqual(['queued']);
  });
});

describe('the recipe of server-sent events', () => {
  it('tells of what is committed, and holds no connection between two events', async () => {
    const url = await bench.serve(exampleIn('recipes/background-work', 'event-stream'), { EventEmitter });
    const stream = nodeRequest(`${url}/balance`, { agent: false }).end();
    const [response] = await once(stream, 'response');
    response.setEncoding('utf8');
    for (const [amount, sum] of [
      [5, '5'],
      [2, '7'],
    ]) {
      const told = once(response, 'data');
      expect((await post(`${url}/entries`, { account: 'a', amount })).status).toBe(201);
      expect(await told).toEqual([`data: {"sum":"${sum}"}\n\n`]);
      await eventually(() => expect(poolUsage(bench.knex).used).toBe(0));
    }
    const refused = await post(`${url}/entries`, { account: 'a', amount: 'many' });
    expect(refused.status).toBe(500);
    stream.destroy();
  });
});

describe('the recipe of uploads', () => {
  let folder: string;
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'uploads-'));
  });
  afterAll(() => rm(folder, { recursive: true }));
  afterEach(async () => Promise.all((await readdir(folder)).map((file) => rm(join(folder, file)))));

  const serve = () => bench.serve(exampleIn('recipes/uploads'), { folder, randomUUID, createWriteStream, rm, join, pipeline });
  const put = (url: string, body: string) => request(`${url}/files/a`, { method: 'PUT', body, headers: { 'Content-Type': 'text/plain' } });

  it('keeps the file with its row, and neither if the row is refused', async () => {
    const url = await serve();
    expect((await put(url, 'the first')).status).toBe(201);
    expect(await put(url, 'the second')).toMatchObject({ status: 500, body: '23505' });
    const [row] = await bench.database.admin('files');
    expect(await readFile(row.path, 'utf8')).toBe('the first');
    expect((await readdir(folder)).map((file) => join(folder, file))).toEqual([row.path]);
  });

  it('holds no connection while the body arrives, and keeps nothing of one that is cut', async () => {
    const url = await serve();
    const upload = nodeRequest(`${url}/files/a`, { method: 'PUT', agent: false, headers: { 'Content-Length': 1_000 } });
    upload.on('error', () => {});
    upload.write('the beginning');
    await eventually(async () => expect(await readdir(folder)).toHaveLength(1));
    expect(poolUsage(bench.knex).used).toBe(0);
    upload.destroy();
    await eventually(async () => expect(await readdir(folder)).toEqual([]));
    expect(await bench.database.admin('files')).toEqual([]);
  });
});
