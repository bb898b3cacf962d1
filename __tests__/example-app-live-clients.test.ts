import { sessionChannels } from 'express-knex-session';
import type { Knex } from 'knex';
import { createApp } from '../example-app/app';
import { configFor } from '../example-app/database';
import { migrate } from '../example-app/migrations';
import { seedIfEmpty } from '../example-app/seed';
import { createDatabase, type TestDatabase } from './support/database';
import { type Listening, listen, RawClient } from './support/http';
import { eventually, poolUsage } from './support/pool';

/* A response that waits behind another one on its connection tells of no `close` when that is reset. */
let database: TestDatabase;
let pool: Knex;
let http: Listening;

beforeAll(async () => {
  database = await createDatabase();
  pool = database.knex(configFor(database.url));
  await migrate(pool);
  await seedIfEmpty(pool);
  http = await listen(createApp(pool, { logError: () => {} }).app);
});

afterAll(async () => {
  await http.close();
  await database.drop();
});

/** Sends this behind a request that takes a while, and resets the connection in the middle of it. */
async function behindReset(path: string): Promise<void> {
  const body = JSON.stringify({ id: crypto.randomUUID(), ms: 2_000 });
  const client = await RawClient.connect(Number(new URL(http.url).port));
  const head = ['POST /live/demo/slow HTTP/1.1', 'Host: localhost', 'Content-Type: application/json', `Content-Length: ${body.length}`];
  client.write([...head, '', body].join('\r\n')).get(path);
  await eventually(() => expect(poolUsage(pool).used).toBe(1));
  await client.reset();
  await eventually(() => expect(poolUsage(pool).used).toBe(0));
}

/** What a page is told first. */
async function hello(): Promise<{ requests: unknown[] }> {
  const { body } = await fetch(`${http.url}/live/events`);
  const reader = (body as ReadableStream<Uint8Array>).getReader();
  let text = '';
  while (!/event: hello\ndata: .*\n/.test(text)) text += new TextDecoder().decode((await reader.read()).value);
  await reader.cancel();
  return JSON.parse(/event: hello\ndata: (.*)/.exec(text)?.[1] as string);
}

it.each(['/live/page.css/', '/LIVE/page.css'])('answers %s with 404', async (path) => {
  expect((await fetch(http.url + path)).status).toBe(404);
});

it('answers HEAD for the stream of events, which would have no end', async () => {
  expect((await fetch(`${http.url}/live/events`, { method: 'HEAD' })).status).toBe(404);
});

it('leaves a stream of events whose client has gone', async () => {
  await behindReset('/live/events');
  await eventually(() => expect(sessionChannels.acquire.hasSubscribers).toBe(false));
});

it('does not show a request for ever whose client has gone', async () => {
  const watcher = await fetch(`${http.url}/live/events`);
  await behindReset('/nothing');
  await eventually(async () => expect((await hello()).requests).toEqual([]));
  await watcher.body?.cancel();
});
