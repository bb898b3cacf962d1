import type { ErrorRequestHandler, Express, Request } from 'express';
import { sessionErrorHandler, sessionMiddleware } from 'express-knex-session';
import { get } from './support/http';
import { flavours, insert, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();
const failure = new Error('mine');

/** Answers with where it stands, as an error handler sees it. */
const tellAs =
  (name: string, status = 500): ErrorRequestHandler =>
  (error, req, res, _next) => {
    res.status(status).json({ name, error: error.message, ...urlsOf(req), outcome: req.session.outcome });
  };
const urlsOf = ({ url, baseUrl, originalUrl }: Request) => ({ url, baseUrl, originalUrl });

describe.each(flavours)('on $version', (flavour) => {
  const { express, route } = flavour;
  const failing = route(async (req) => {
    await insert(req, 'a');
    throw failure;
  });
  const refusedAtCommit = route(async (req, res) => {
    await insert(req, 'a', 'fail');
    res.json({ ok: true });
  });
  const listening = (setUp: (app: Express) => void) => {
    const app = express();
    app.use(sessionMiddleware(ledger.knex));
    setUp(app);
    return ledger.listen(app);
  };
  const ask = async (url: string) => {
    const answer = await get(url);
    return { status: answer.status, ...JSON.parse(answer.body) };
  };

  describe('when a nested router has an error handler of its own', () => {
    const nested = (status: number, ...before: ErrorRequestHandler[]) =>
      listening((app) => {
        const router = express.Router();
        router.get('/fail', failing);
        router.use(...before, tellAs('nested', status));
        app.use('/nested', router);
        app.use(sessionErrorHandler(), tellAs('app'));
      });

    // Scenario 18.
    it.each([200, 302, 500])(
      'has rolled back before that answers %d, if sessionErrorHandler() is mounted in the router too',
      async (status) => {
        const { url } = await nested(status, sessionErrorHandler());
        expect(await ask(`${url}/nested/fail`)).toMatchObject({ status, name: 'nested', error: 'mine', outcome: 'rolled back' });
        expect(await ledger.stored()).toEqual([]);
      },
    );

    it('goes by the status of its answer if it is not: that handler is run before ours', async () => {
      const found = await nested(302);
      expect(await ask(`${found.url}/nested/fail`)).toMatchObject({ status: 302, name: 'nested', outcome: 'open' });
      expect(await ledger.stored()).toEqual(['a']);
      await ledger.database.admin('notes').del();

      const failed = await nested(500);
      expect(await ask(`${failed.url}/nested/fail`)).toMatchObject({ status: 500, name: 'nested', outcome: 'open' });
      expect(await ledger.stored()).toEqual([]);
    });

    it('is the first to get the error of a failed COMMIT, with the URL as the router sees it', async () => {
      const { url } = await listening((app) => {
        const router = express.Router();
        router.get('/pay/:id', refusedAtCommit);
        router.use(tellAs('nested'));
        app.use('/nested', router);
        app.use(sessionErrorHandler(), tellAs('app'));
      });
      expect(await ask(`${url}/nested/pay/1?q=2`)).toEqual({
        status: 500,
        name: 'nested',
        error: 'note a is refused at COMMIT',
        url: '/pay/1?q=2',
        baseUrl: '/nested',
        originalUrl: '/nested/pay/1?q=2',
        outcome: 'rolled back',
      });
    });
  });

  describe('when an error comes out of nested routers without error handlers', () => {
    const inRouters = (handler: ReturnType<typeof route>) =>
      listening((app) => {
        const inner = express.Router({ mergeParams: true });
        inner.get('/pay', handler);
        const outer = express.Router();
        outer.use('/inner/:id', inner);
        app.use('/outer', outer);
        app.use('/elsewhere', tellAs('elsewhere'));
        app.use(sessionErrorHandler(), tellAs('app'));
      });
    const inSubApps = (handler: ReturnType<typeof route>) =>
      listening((app) => {
        const inner = express();
        inner.get('/pay', handler);
        const outer = express();
        outer.use('/inner/:id', inner);
        app.use('/outer', outer);
        app.use('/elsewhere', tellAs('elsewhere'));
        app.use(sessionErrorHandler(), tellAs('app'));
      });
    it.each([
      ['routers', inRouters],
      ['sub-apps', inSubApps],
    ])('reaches the handlers of the app out of %s, with its URL: after a rejection and after a failed COMMIT', async (_, mount) => {
      const expected = {
        status: 500,
        name: 'app',
        url: '/outer/inner/7/pay',
        baseUrl: '',
        originalUrl: '/outer/inner/7/pay',
        outcome: 'rolled back',
      };
      const rejecting = await mount(failing);
      expect(await ask(`${rejecting.url}/outer/inner/7/pay`)).toEqual({ ...expected, error: 'mine' });
      const refused = await mount(refusedAtCommit);
      expect(await ask(`${refused.url}/outer/inner/7/pay`)).toEqual({ ...expected, error: 'note a is refused at COMMIT' });
      expect(await ledger.stored()).toEqual([]);
    });
  });

  describe('when a sub-app has error handlers of its own', () => {
    it('is the first to get the error of a failed COMMIT, and may pass it on', async () => {
      const { url } = await listening((app) => {
        const sub = express();
        sub.get('/kept', refusedAtCommit);
        sub.get('/passed', refusedAtCommit);
        sub.use('/kept', tellAs('sub'));
        sub.use('/passed', ((error, _req, _res, next) => next(new Error(`passed on: ${error.message}`))) as ErrorRequestHandler);
        app.use('/sub', sub);
        app.use(sessionErrorHandler(), tellAs('app'));
      });
      expect(await ask(`${url}/sub/kept`)).toMatchObject({ name: 'sub', url: '/', baseUrl: '/sub/kept' });
      expect(await ask(`${url}/sub/passed`)).toMatchObject({
        name: 'app',
        url: '/sub/passed',
        baseUrl: '',
        error: 'passed on: note a is refused at COMMIT',
      });
    });
  });

  describe('when the handler answers before its router has come to its error handlers', () => {
    it('skips the handlers in front of it, which are not for it', async () => {
      const { url } = await listening((app) => {
        app.use(tellAs('too early'));
        app.get('/', refusedAtCommit);
        app.get('/', () => {
          throw new Error('must not run');
        });
        app.use(tellAs('app'));
      });
      expect(await ask(url)).toMatchObject({ name: 'app', error: 'note a is refused at COMMIT' });
    });

    it('goes on behind an error handler whose own answer was to be committed', async () => {
      const { url } = await listening((app) => {
        app.get(
          '/',
          route(async (req) => {
            await insert(req, 'a', 'fail');
            throw failure;
          }),
        );
        app.use(tellAs('first', 302), tellAs('second'));
      });
      expect(await ask(url)).toMatchObject({ status: 500, name: 'second', error: 'note a is refused at COMMIT' });
    });

    it('runs no second handler of the same route', async () => {
      let runs = 0;
      const { url } = await listening((app) => {
        app.get('/', refusedAtCommit, (_req, res) => {
          runs++;
          res.sendStatus(200);
        });
        app.use(tellAs('app'));
      });
      expect(await ask(url)).toMatchObject({ status: 500, name: 'app' });
      expect(runs).toBe(0);
    });

    it('does so for a middleware that answers too', async () => {
      const { url } = await listening((app) => {
        app.use('/guarded', refusedAtCommit);
        app.use(tellAs('app'));
      });
      expect(await ask(`${url}/guarded/x`)).toMatchObject({ name: 'app', url: '/guarded/x', baseUrl: '' });
    });
  });

  // A limit: by then the app's error handlers have been passed.
  describe('when the handler calls next() after its response', () => {
    const answerAndGoOn = (at: 'fail' | undefined) =>
      route(async (req, res, next) => {
        await insert(req, 'a', at);
        res.cookie('kind', 'mine').json({ ok: true });
        next();
      });
    it('sends the response after COMMIT', async () => {
      const { url } = await listening((app) => {
        app.use(answerAndGoOn(undefined));
        app.use(tellAs('app'));
      });
      expect(await get(url)).toMatchObject({ status: 200, body: '{"ok":true}', complete: true });
      expect(await ledger.stored()).toEqual(['a']);
    });

    it.each(['in the app', 'in a nested router'])('answers a failed COMMIT by the default error handler (%s)', async (place) => {
      const { url } = await listening((app) => {
        const router = place === 'in the app' ? app : express.Router();
        router.use(answerAndGoOn('fail'));
        if (router !== app) app.use(router);
        app.use(tellAs('app'));
      });
      const answer = await get(url);
      expect(answer).toMatchObject({ status: 500, complete: true });
      expect(answer.headers['content-type']).toMatch('text/html');
      expect(answer.headers['set-cookie']).toBeUndefined();
      expect(await ledger.stored()).toEqual([]);
    });
  });

  describe('when the middleware is mounted in one router only', () => {
    const inRouter = () =>
      ledger.listen(
        express()
          .use(
            '/api',
            express
              .Router()
              .use(sessionMiddleware(ledger.knex))
              .get(
                '/ok',
                route(async (req, res) => {
                  await insert(req, 'a');
                  res.sendStatus(201);
                }),
              )
              .get('/refused', refusedAtCommit)
              .get('/fail', failing)
              .use(sessionErrorHandler(), tellAs('router')),
          )
          .get('/plain', (req, res) => void res.json({ has: 'session' in req })),
      );
    it('does all of its work there, and nothing elsewhere', async () => {
      const { url } = await inRouter();
      expect(await ask(`${url}/plain`)).toMatchObject({ has: false });
      expect(await ask(`${url}/api/refused`)).toMatchObject({ name: 'router', baseUrl: '/api', url: '/refused' });
      expect(await ask(`${url}/api/fail`)).toMatchObject({ name: 'router', outcome: 'rolled back' });
      expect(await ledger.stored()).toEqual([]);
      expect(await get(`${url}/api/ok`)).toMatchObject({ status: 201 });
      expect(await ledger.stored()).toEqual(['a']);
    });
  });
});
