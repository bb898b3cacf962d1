// Before the middleware is made.
process.env['NODE_ENV'] = 'development';

import { connect } from 'node:net';
import express, { type Express } from 'express';
import { retryable, sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { createDatabase, type TestDatabase } from './support/database';
import { get, type Listening, listen, request } from './support/http';

declare const realProcess: NodeJS.Process;

interface SessionWarning extends Error {
  code: string;
  detail?: string;
}

let database: TestDatabase;
let knex: Knex;
let http: Listening;
let warnings: SessionWarning[] = [];
const remember = (warning: Error): void => void warnings.push(warning as SessionWarning);

beforeAll(async () => {
  database = await createDatabase();
  await database.admin.schema.createTable('notes', (table) => table.text('text'));
  knex = database.knex({ pool: { min: 0, max: 2 } });
  http = await listen(app());
  realProcess.on('warning', remember);
});

beforeEach(() => {
  warnings = [];
});

afterAll(async () => {
  realProcess.off('warning', remember);
  await http.close();
  await database.drop();
});

/** Warnings come in a tick of their own. */
async function told(): Promise<SessionWarning[]> {
  await new Promise((resolve) => setImmediate(resolve));
  return warnings;
}

const note = (session: Knex, text = 'a') => session('notes').insert({ text });

/** A service that has its own idea of the database. */
async function countOnRoot(): Promise<unknown> {
  return knex('notes').count();
}

function app(): Express {
  const app = express();
  app.use(sessionMiddleware(knex, { acquireTimeout: 300 }));
  app.get('/root', async (req, res) => {
    await note(req.session);
    await countOnRoot();
    res.send('ok');
  });
  app.get('/root-transaction', async (req, res) => {
    await note(req.session);
    await knex.transaction((trx) => note(trx));
    res.send('ok');
  });
  app.get('/apart', async (req, res) => {
    await knex('notes').count();
    await note(req.session);
    await req.session.commit();
    await knex('notes').count();
    await withSession(knex, (session) => note(session));
    res.send('ok');
  });
  app.post('/login', async (req, res) => {
    await note(req.session);
    await req.session('notes').where('text', 'b').update({ text: 'c' });
    res.status(401).send('no');
  });
  app.post('/meant', async (req, res) => {
    await note(req.session);
    req.session.setRollbackOnly();
    res.status(401).send('no');
  });
  app.post('/read-only', async (req, res) => {
    await req.session('notes');
    res.status(404).send('no');
  });
  app.post('/thrown', async (req) => {
    await note(req.session);
    throw new Error('no');
  });
  app.post('/committed', async (req, res) => {
    await note(req.session);
    await req.session.commit();
    res.status(401).send('no');
  });
  app.post(
    '/retried',
    retryable(async (req, res) => {
      await note(req.session);
      res.status(409).send('no');
    }),
  );
  app.post('/upload', async (req, res) => {
    await req.session('notes').first();
    req.resume().once('end', () => res.send('ok'));
  });
  app.use(sessionErrorHandler());
  return app;
}

describe('when a statement is sent to the root knex while the session of the request holds a connection', () => {
  it('says so, with the line of it (hazard 16)', async () => {
    await get(`${http.url}/root`);
    expect(await told()).toEqual([
      expect.objectContaining({
        name: 'SessionWarning',
        code: 'EXPRESS_KNEX_SESSION_ROOT_KNEX_IN_REQUEST',
        message: expect.stringMatching(/^GET \/root ran a statement on the root knex while its session held a connection\. .*req\.session/),
        detail: expect.stringMatching(/^ +at .*diagnostics\.test\.ts:\d+:\d+\)/),
      }),
    ]);
  });

  it('says so once for each place', async () => {
    await get(`${http.url}/root`);
    await get(`${http.url}/root-transaction`);
    await get(`${http.url}/root-transaction`);
    expect((await told()).map(({ message }) => message)).toEqual([expect.stringMatching(/^GET \/root-transaction /)]);
  });

  it('says nothing before the first statement, after commit(), or of withSession()', async () => {
    await get(`${http.url}/apart`);
    expect(await told()).toEqual([]);
  });
});

describe('when a response from 400 on has rolled back writes', () => {
  it('says how many, why, and what to do (hazard 43)', async () => {
    await request(`${http.url}/login?password=secret`, { method: 'POST' });
    await request(`${http.url}/login`, { method: 'POST' });
    expect(await told()).toEqual([
      expect.objectContaining({
        code: 'EXPRESS_KNEX_SESSION_WRITES_ROLLED_BACK',
        message:
          'POST /login rolled back 2 writes because of 401: commit first if they must stay (await req.session.commit()); ' +
          'say so if they must not (req.session.setRollbackOnly()).',
      }),
    ]);
  });

  it.each(['/meant', '/read-only', '/thrown', '/committed'])(
    'says nothing where nothing is lost that was meant to stay: %s',
    async (path) => {
      await request(`${http.url}${path}`, { method: 'POST' });
      expect(await told()).toEqual([]);
    },
  );

  it('says so of a retryable handler, too', async () => {
    await request(`${http.url}/retried`, { method: 'POST' });
    expect((await told()).map(({ message }) => message)).toEqual([
      expect.stringMatching(/^POST \/retried rolled back 1 write because of 409/),
    ]);
  });
});

describe("when a session holds its connection while the request's body is still arriving", () => {
  it('says so (hazard 41)', async () => {
    const socket = connect(http.port, '127.0.0.1');
    socket.write('POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\nConnection: close\r\n\r\nabc');
    while ((await told()).length === 0) await new Promise((resolve) => setTimeout(resolve, 5));
    const closed = new Promise((resolve) => socket.once('close', resolve).resume());
    socket.write('def');
    await closed;
    expect(warnings).toMatchObject([
      { code: 'EXPRESS_KNEX_SESSION_BODY_STILL_ARRIVING', message: expect.stringMatching(/^POST \/upload has opened its session while/) },
    ]);
  });

  it('says nothing of a body that was there with the request', async () => {
    await request(`${http.url}/meant`, { method: 'POST', body: { a: 1 } });
    expect(await told()).toEqual([]);
  });
});

describe.each(['production', 'test'])('when NODE_ENV is %s', (environment) => {
  it('says nothing', async () => {
    process.env['NODE_ENV'] = environment;
    const quiet = await listen(app());
    const answers = await Promise.all(['/root-transaction', '/apart'].map((path) => get(`${quiet.url}${path}`)));
    await request(`${quiet.url}/login`, { method: 'POST' });
    expect(answers.map(({ status }) => status)).toEqual([200, 200]);
    expect(await told()).toEqual([]);
    await quiet.close();
  });
});
