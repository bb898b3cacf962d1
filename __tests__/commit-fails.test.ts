import type { Response } from 'express';
import { sessionErrorHandler, sessionMiddleware, TransactionAbortedError } from 'express-knex-session';
import { get, keepAliveAgent, RawClient } from './support/http';
import { answerErrors, flavours, insert, useLedger } from './support/ledger';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

describe.each(flavours)('on $version', (flavour) => {
  const { express, route } = flavour;
  const serve = ledger.serving(flavour);

  // Scenario 19.
  describe('when a deferred constraint fails at COMMIT', () => {
    const answers: [string, (res: Response) => unknown][] = [
      ['a 200 by json()', (res) => res.json({ ok: true })],
      ['a 201 by send()', (res) => res.status(201).send('made')],
      ['a redirect()', (res) => res.redirect('/elsewhere')],
      ['a 304', (res) => res.status(304).end()],
      ['a 204', (res) => res.sendStatus(204)],
      ['writeHead(200) with a length, and end()', (res) => res.writeHead(200, 'Fine', { 'Content-Length': 4 }).end('made')],
      [
        'write() and end()',
        (res) => {
          res.write('half');
          res.end('other half');
        },
      ],
      [
        'flushHeaders() and end()',
        (res) => {
          res.flushHeaders();
          res.end('late');
        },
      ],
    ];
    it.each(answers)('turns %s into the error response', async (_, answerWith) => {
      const { url, errors } = await serve(async (req, res) => {
        await insert(req, 'a', 'fail');
        answerWith(res);
      });

      const answer = await get(url);

      expect(answer).toMatchObject({ status: 500, body: '{"code":"23514","message":"note a is refused at COMMIT"}', complete: true });
      expect(answer.headers['content-length']).toBe(String(answer.body.length));
      expect(errors).toHaveLength(1);
      expect(poolUsage(ledger.knex)).toMatchObject({ used: 0, free: expect.any(Number) });
      expect(await ledger.stored()).toEqual([]);
    });

    it("takes the handler's headers back, and keeps those that were there before", async () => {
      const app = express();
      app.use((_req, res, next) => {
        res.set({ 'X-Early': 'early', 'Cache-Control': 'no-store', Vary: 'Origin' }).cookie('early', '1').status(203);
        next();
      });
      app.use(sessionMiddleware(ledger.knex));
      app.use(
        route(async (req, res) => {
          await insert(req, 'a', 'fail');
          res.cookie('late', '1').location('/notes/a').vary('Accept').set({ 'X-Early': 'changed', 'X-Late': 'late' });
          res.set({ ETag: '"1"', 'Last-Modified': new Date(0).toUTCString(), Expires: new Date(0).toUTCString() });
          res.set({ 'Cache-Control': 'public, max-age=600', 'Content-Language': 'de', 'Content-Disposition': 'attachment' });
          res.status(201).type('text/csv').send('a;b');
        }),
      );
      app.use(sessionErrorHandler(), answerErrors([]));
      const { url } = await ledger.listen(app);

      const { status, headers } = await get(url);

      expect(status).toBe(500);
      expect(headers).toMatchObject({ 'x-early': 'early', 'cache-control': 'no-store', vary: 'Origin', 'set-cookie': ['early=1; Path=/'] });
      expect(headers['content-type']).toBe('application/json; charset=utf-8');
      const gone = ['x-late', 'location', 'last-modified', 'expires', 'content-language', 'content-disposition'];
      expect(Object.keys(headers).filter((name) => gone.includes(name))).toEqual([]);
      expect(headers['etag']).not.toBe('"1"');
    });

    it("takes the handler's status message back", async () => {
      const { port } = await serve(async (req, res) => {
        await insert(req, 'a', 'fail');
        res.statusMessage = 'Mine';
        res.status(201).end();
      });
      const client = await RawClient.connect(port);
      client.get('/', 'Connection: close');
      await client.closed;
      expect(client.received).toMatch(/^HTTP\/1\.1 500 Internal Server Error\r\n/);
    });

    it('takes cookies and caching back even if they were set before the first statement', async () => {
      const { url } = await serve(async (req, res) => {
        res.cookie('late', '1').set({ 'Cache-Control': 'public', ETag: '"1"', 'X-Request-Id': '7' });
        await insert(req, 'a', 'fail');
        res.json({});
      });
      const { headers } = await get(url);
      expect(headers['set-cookie']).toBeUndefined();
      expect(headers['cache-control']).toBeUndefined();
      expect(headers['x-request-id']).toBe('7');
    });

    it('answers with the status of the error, if it has one', async () => {
      // As a driver's wrapper, or an application's hook in Knex, may do.
      const knex = ledger.pool();
      knex.on('query-error', (error) => Object.assign(error, { status: 409 }));
      const { url } = await serve(
        async (req, res) => {
          await insert(req, 'a', 'fail');
          res.json({});
        },
        { knex, errorHandlers: [(_error, _req, res, _next) => res.end()] },
      );
      expect(await get(url)).toMatchObject({ status: 409 });
    });

    it('leaves the connection, and the next request on it, clean', async () => {
      const agent = keepAliveAgent();
      const { url } = await serve(async (req, res) => {
        if (req.path === '/refused') await insert(req, 'a', 'fail');
        else await insert(req, 'b');
        res.cookie('kind', 'mine').sendStatus(201);
      });
      expect(await get(`${url}/refused`, { agent })).toMatchObject({ status: 500, complete: true });
      expect(await get(`${url}/fine`, { agent })).toMatchObject({ status: 201, headers: { 'set-cookie': ['kind=mine; Path=/'] } });
      expect(await ledger.stored()).toEqual(['b']);
      agent.destroy();
    });

    it('keeps a pipelined request behind it in step', async () => {
      const { port } = await serve(async (req, res) => {
        await insert(req, req.path, req.path === '/refused' ? 'fail' : undefined);
        res.send(`done ${req.path}`);
      });
      const client = await RawClient.connect(port);
      client.get('/refused').get('/fine').get('/refused').get('/last', 'Connection: close');
      await client.closed;
      expect(client.received.match(/HTTP\/1\.1 \d+/g)).toEqual(['500', '200', '500', '200'].map((status) => `HTTP/1.1 ${status}`));
      expect(await ledger.stored()).toEqual(['/fine', '/last']);
    });
  });

  // Scenario 20.
  describe('when a statement fails, its error is swallowed, and a success is sent', () => {
    it('answers 500 ERR_TRANSACTION_ABORTED, whose cause is the first swallowed error', async () => {
      const swallowed: unknown[] = [];
      const { url, errors } = await serve(async (req, res) => {
        await insert(req, 'a');
        for (const sql of ['SELECT 1/0', 'SELECT nothing']) await req.session.raw(sql).catch((error) => swallowed.push(error));
        res.json({ ok: true });
      });

      const answer = await get(url);

      expect(answer).toMatchObject({ status: 500 });
      expect(errors).toEqual([expect.any(TransactionAbortedError)]);
      expect(errors[0]).toMatchObject({ code: 'ERR_TRANSACTION_ABORTED', cause: { code: '22012' } });
      expect(errors[0].cause).toBe(swallowed[0]);
      // Scenario 26: the second statement's own error explains itself.
      expect(swallowed[1]).toMatchObject({ code: '25P02', cause: swallowed[0] });
      expect(answer.body).not.toContain('1/0');
      expect(await ledger.stored()).toEqual([]);
    });

    it('keeps a response with an error status', async () => {
      const { url, errors } = await serve(async (req, res) => {
        await req.session.raw('SELECT 1/0').catch(() => {});
        res.status(422).send('mine');
      });
      expect(await get(url)).toMatchObject({ status: 422, body: 'mine' });
      expect(errors).toEqual([]);
    });

    // Scenario 26.
    it('is well again after a savepoint was rolled back', async () => {
      const { url } = await serve(async (req, res) => {
        await insert(req, 'a');
        await req.session
          .transaction(async (trx) => {
            await trx('notes').insert({ id: 'b' });
            await trx('notes').insert({ id: 'a' });
          })
          .catch(() => {});
        await insert(req, 'c');
        res.sendStatus(200);
      });
      expect(await get(url)).toMatchObject({ status: 200 });
      expect(await ledger.stored()).toEqual(['a', 'c']);
    });
  });

  // Scenario 27.
  describe('when COMMIT fails by serialization (40001)', () => {
    it('passes the error on, and leaves the connection in the pool', async () => {
      const { url, errors } = await serve(async (req, res) => {
        await insert(req, 'a', req.path === '/conflict' ? 'conflict' : undefined);
        const { rows } = await req.session.raw('SELECT pg_backend_pid() AS pid');
        res.json(rows[0]);
      });
      const before = await get(`${url}/`);
      await ledger.database.admin('notes').del();
      expect(await get(`${url}/conflict`)).toMatchObject({ status: 500, body: expect.stringContaining('40001') });
      expect(errors).toEqual([expect.objectContaining({ code: '40001' })]);
      expect(await get(`${url}/`)).toMatchObject({ status: 200, body: before.body });
    });

    it('happens for real between two requests', async () => {
      const arrived = new Set<() => void>();
      const { url, errors } = await serve(async (req, res) => {
        await req.session.raw('SET TRANSACTION ISOLATION LEVEL SERIALIZABLE');
        await req.session('notes').count();
        await new Promise<void>((resolve) => {
          arrived.add(resolve);
          if (arrived.size === 2) for (const go of arrived) go();
        });
        await insert(req, req.path);
        res.sendStatus(201);
      });
      const answers = await Promise.all([get(`${url}/a`), get(`${url}/b`)]);
      expect(answers.map(({ status }) => status).sort()).toEqual([201, 500]);
      expect(errors).toEqual([expect.objectContaining({ code: '40001' })]);
      expect(await ledger.stored()).toHaveLength(1);
    });
  });
});
