import type { Express } from 'express';
import { SessionTimeoutError } from 'express-knex-session';
import { type TestDatabase, testDatabase } from 'express-knex-session/testing';
import request from 'supertest';
import { createApp } from '../example-app/app';
import { configFor } from '../example-app/database';
import { migrate } from '../example-app/migrations';
import { toProblem } from '../example-app/to-problem';
import { createDatabase, type TestDatabase as Server } from './support/database';
import { balanceOf, externalAccount, transfer, twoAccounts } from './support/example-app-requests';

/* Set up as in example-app.test.ts. */
let server: Server;
let database: TestDatabase;
let app: Express;
const logged: unknown[] = [];
let notify: () => void;

beforeAll(async () => {
  server = await createDatabase();
  const knex = server.knex(configFor(server.url));
  await migrate(knex);

  database = testDatabase(knex, { isolationLevel: 'repeatable read' });
  ({ app } = createApp(database.knex, { logError: (error) => logged.push(error), notify: () => notify() }));
});
beforeEach(() => {
  logged.length = 0;
  notify = () => {};
  return database.begin();
});
afterEach(() => database.rollback());
afterAll(() => server.drop());

describe('when the input is not valid', () => {
  const id = '6f1d3c5e-0000-4000-8000-000000000001';
  const other = '6f1d3c5e-0000-4000-8000-000000000002';
  const good = { id, from: id, to: other, amount: 1 };

  it.each([
    ['no fields', '/transfers', {}, ['id', 'from', 'to', 'amount']],
    ['a list', '/transfers', [], ['']],
    ['a bad id', '/transfers', { ...good, from: "'; drop table entries; --" }, ['from']],
    ['the same account twice', '/transfers', { ...good, to: id }, ['to']],
    ['zero', '/transfers', { ...good, amount: 0 }, ['amount']],
    ['less than zero', '/transfers', { ...good, amount: -1 }, ['amount']],
    ['half a cent', '/transfers', { ...good, amount: 0.5 }, ['amount']],
    ['a decimal point', '/transfers', { ...good, amount: '12.50' }, ['amount']],
    ['a number that JSON rounds', '/transfers', { ...good, amount: 2 ** 53 }, ['amount']],
    ['more than bigint', '/transfers', { ...good, amount: '9'.repeat(30) }, ['amount']],
    ['U+0000, which PostgreSQL refuses', '/transfers', { ...good, memo: 'a\0b' }, ['memo']],
    ['half a surrogate pair', '/transfers', { ...good, memo: '\ud800' }, ['memo']],
    ['an unknown field', '/transfers', { ...good, currency: 'EUR' }, ['']],
    ['an empty name', '/accounts', { name: ' ' }, ['name']],
    ['a long name', '/accounts', { name: 'x'.repeat(201) }, ['name']],
    ['an unknown kind', '/accounts', { name: 'Ada', kind: 'bank' }, ['kind']],
  ])('names the fields: %s', async (_name, path, body, fields) => {
    const response = await request(app)
      .post(path)
      .send(body)
      .expect(400)
      .expect('content-type', /^application\/problem\+json/);

    expect(response.body).toMatchObject({ type: expect.stringContaining('invalid-input'), status: 400 });
    expect(response.body.errors.map(({ field }: { field: string }) => field)).toEqual(fields);
  });

  it.each([
    ['JSON that does not parse', 400, 'invalid-json', { body: '{"name": "Ada' }],
    ['a JSON value that is no object', 400, 'invalid-json', { body: '"Ada"' }],
    ['another content type', 415, 'unsupported-media-type', { body: 'name=Ada', contentType: 'application/x-www-form-urlencoded' }],
    ['an unknown charset', 415, 'unsupported-media-type', { body: '{}', contentType: 'application/json; charset=x-user' }],
    ['no content type', 415, 'unsupported-media-type', {}],
    ['an empty body', 400, 'invalid-input', { body: '' }],
    ['a body of 11 kB', 413, 'payload-too-large', { body: JSON.stringify({ name: 'x'.repeat(11_000) }) }],
  ])('says so: %s', async (_name, status, type, { body, contentType = 'application/json' }: { body?: string; contentType?: string }) => {
    const sent = request(app).post('/accounts');
    const response = await (body === undefined ? sent : sent.type(contentType).send(body));
    expect(response.status).toBe(status);
    expect(response.headers['content-type']).toMatch(/^application\/problem\+json/);
    expect(response.body).toMatchObject({ type: `https://ledger.example/problems/${type}`, status });
  });
});

describe('when something does not exist', () => {
  const missing = '6f1d3c5e-0000-4000-8000-000000000001';

  it.each([
    ['an account', 404, 'not-found', `/accounts/${missing}`],
    ['its statement', 404, 'not-found', `/accounts/${missing}/statement.csv`],
    ['a transfer', 404, 'not-found', `/transfers/${missing}`],
    ['a route', 404, 'not-found', '/nowhere'],
    ['an id that is none', 400, 'invalid-input', '/accounts/1'],
    ['a path that does not decode', 400, 'bad-request', '/accounts/%E0%A4%A'],
  ])('answers a problem: %s', async (_name, status, type, path) => {
    const response = await request(app)
      .get(path)
      .expect(status)
      .expect('content-type', /^application\/problem\+json/);
    expect(response.body).toMatchObject({ type: `https://ledger.example/problems/${type}`, status });
  });

  it.each(['from', 'to'])('stores nothing of a transfer whose account is missing: %s', async (side) => {
    const { from, to } = await twoAccounts(app, { balance: 10 });
    const before = await rows();

    const { body } = await transfer(app, { from, to, amount: 1, [side]: missing }).expect(422);

    expect(body).toEqual({
      type: 'https://ledger.example/problems/unknown-account',
      title: 'The transfer names an account that does not exist',
      status: 422,
    });
    expect(await rows()).toEqual(before);
  });
});

describe('when something unexpected fails', () => {
  it.each(['', '/statement.csv'])('answers a bare 500, and logs the error: /accounts/:id%s', async (path) => {
    const id = await externalAccount(app);
    await database.knex.raw('alter table transfers rename to moved'); // Rolled back with the rest of the test.

    const { body, headers } = await request(app).get(`/accounts/${id}${path}`).expect(500);

    expect(body).toEqual({
      type: 'https://ledger.example/problems/internal-server-error',
      title: 'Internal Server Error',
      status: 500,
    });
    expect(headers).not.toHaveProperty('content-disposition');
    expect(logged).toEqual([expect.objectContaining({ code: '42P01' })]);
  });
});

describe('when a notification fails', () => {
  it('logs the error, and the transfer stays', async () => {
    const { from, to } = await twoAccounts(app, { balance: 10 });
    const error = new Error('nobody listens');
    notify = () => {
      throw error;
    };

    await transfer(app, { from, to, amount: 1 }).expect(201);

    expect(logged).toEqual([error]);
    expect(await balanceOf(database.knex, to)).toBe('1');
  });
});

describe('when a request takes too long', () => {
  it('says so, and that nothing was stored', () => {
    const { status, headers, body } = toProblem(new SessionTimeoutError(10_000));
    expect({ status, headers, body }).toMatchObject({
      status: 503,
      headers: { 'retry-after': '1' },
      body: { detail: expect.stringMatching('nothing was stored') },
    });
  });
});

async function rows(): Promise<unknown> {
  return { transfers: await database.knex('transfers'), entries: await database.knex('entries') };
}
