import { never, openSite, type Site, type SiteOptions } from './support/deadlines';
import { get, RawClient } from './support/http';
import { flavours, type Handler, insert, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const ledger = useLedger();

// Scenario 80, hazard 37.
describe.each(flavours)("when an application's own time limit answers while its handler runs, on $version", (flavour) => {
  const tooSlow = Object.assign(new Error('too slow'), { status: 504, code: 'TOO_SLOW' });

  /** `/slow` has a time limit of the handler's own, `/next` is innocent. */
  const slowSite = (slow: Handler, options: SiteOptions = {}): Promise<Site> =>
    openSite(
      ledger,
      {
        routes(app) {
          app.get('/slow', flavour.route(slow) as never);
          app.get(
            '/next',
            flavour.route(async (req, res) => {
              await insert(req, 'next');
              res.send('served');
            }) as never,
          );
        },
      },
      { flavour, ...options },
    );

  const slowHandlers: [string, (goOn: Promise<void>) => Handler][] = [
    [
      'a statement runs',
      () => async (req, res, next) => {
        await insert(req, 'a');
        setTimeout(() => next(tooSlow), 30);
        await req.session.raw('SELECT pg_sleep(10)');
        res.send('late');
      },
    ],
    [
      'a statement runs that ends soon',
      () => async (req, res, next) => {
        await insert(req, 'a');
        setTimeout(() => next(tooSlow), 30);
        await req.session.raw('SELECT pg_sleep(0.05)');
        await insert(req, 'b');
        res.send('late');
      },
    ],
    [
      'nothing runs, and the handler throws later',
      (goOn) => async (req, _res, next) => {
        await insert(req, 'a');
        setTimeout(() => next(tooSlow), 30);
        await goOn;
        throw new Error('late');
      },
    ],
    [
      'nothing runs, and the handler answers later',
      (goOn) => async (req, res, next) => {
        await insert(req, 'a');
        setTimeout(() => next(tooSlow), 30);
        await goOn;
        res.send('late');
      },
    ],
    [
      'several statements wait for each other',
      () => async (req, res, next) => {
        setTimeout(() => next(tooSlow), 30);
        await Promise.all([req.session.raw('SELECT pg_sleep(10)'), insert(req, 'b'), insert(req, 'c')]);
        res.send('late');
      },
    ],
    [
      'one statement comes after the other',
      () => async (req, res, next) => {
        setTimeout(() => next(tooSlow), 30);
        for (let i = 0; i < 10_000; i++) await insert(req, `a${i}`);
        res.send('late');
      },
    ],
    [
      'one statement comes after the other, and one is not awaited',
      () => async (req, res, next) => {
        req.session.raw('SELECT pg_sleep(0.05)').catch(() => {});
        await new Promise((resolve) => setTimeout(resolve, 20));
        next(tooSlow);
        await new Promise((resolve) => setTimeout(resolve, 10));
        await insert(req, 'a');
        res.send('late');
      },
    ],
    [
      'a statement runs in a savepoint',
      () => async (req, res, next) => {
        setTimeout(() => next(tooSlow), 30);
        await req.session.transaction((trx) => trx.raw('SELECT pg_sleep(10)'));
        res.send('late');
      },
    ],
  ];

  it.each(slowHandlers)(
    'answers by that error, stores nothing, and serves the next request on the connection: %s',
    async (_when, handlerFor) => {
      const goOn = deferred();
      const site = await slowSite(handlerFor(goOn.promise));
      const client = await RawClient.connect(site.port);
      client.get('/slow');
      await client.readUntil('TOO_SLOW');
      expect(client.received).toMatch(/^HTTP\/1\.1 504 /);
      if (!/connection: close/i.test(client.received)) {
        client.get('/next');
        goOn.resolve();
        await client.readUntil('served');
        expect(client.received).not.toContain('late');
        await client.destroy();
      } else {
        goOn.resolve();
        await client.closed;
        expect((await get(`${site.url}/next`)).body).toBe('served');
      }
      expect(site.errors).toEqual([tooSlow]);
      expect(await ledger.stored()).toEqual(['next']);
      await ledger.isClean();
    },
  );

  // The reader hears of the stream's end before the rollback is done, and his error comes first.
  it('answers by the error of a stream that is being read, stores nothing, and serves the next request on the connection', async () => {
    const site = await slowSite(async (req, res, next) => {
      await insert(req, 'a');
      setTimeout(() => next(tooSlow), 30);
      for await (const _row of req.session.raw('SELECT i, pg_sleep(0.001) FROM generate_series(1, 9999) AS i').stream());
      res.send('late');
    });
    const client = await RawClient.connect(site.port);
    client.get('/slow');
    await client.readUntil('"code"');
    expect(client.received).toMatch(/^HTTP\/1\.1 50[04] .*"(ERR_SESSION_CLOSED|TOO_SLOW)"/s);
    client.get('/next');
    await client.readUntil('served');
    await client.destroy();
    expect([...site.errors, ...site.reported]).toContain(tooSlow);
    expect(await ledger.stored()).toEqual(['next']);
    await ledger.isClean();
  });

  it('lets the next request finish that was under way when the late error came', async () => {
    const goOn = deferred();
    const statement = deferred();
    const late = deferred();
    const site = await openSite(
      ledger,
      {
        routes(app) {
          app.get(
            '/slow',
            flavour.route(async (req, _res, next) => {
              await insert(req, 'a');
              next(tooSlow);
              await goOn.promise;
              late.resolve();
              throw new Error('late');
            }) as never,
          );
          app.get(
            '/next',
            flavour.route(async (req, res) => {
              await insert(req, 'next');
              statement.resolve();
              await late.promise;
              for (let turn = 0; turn < 3; turn++) await new Promise(setImmediate);
              res.send('served');
            }) as never,
          );
        },
      },
      { flavour },
    );
    const client = await RawClient.connect(site.port);
    client.get('/slow');
    await client.readUntil('TOO_SLOW');
    client.get('/next');
    await statement.promise;
    goOn.resolve();
    await client.readUntil('served');
    await client.destroy();
    expect(await ledger.stored()).toEqual(['next']);
  });

  it('lets a client that is still there end by itself what never ends', async () => {
    const site = await slowSite(async (req, _res, next) => {
      await insert(req, 'a');
      next(tooSlow);
      await never();
    });
    const answers = await Promise.all([1, 2, 3].map(() => get(`${site.url}/slow`)));
    expect(answers.map(({ status }) => status)).toEqual([504, 504, 504]);
    await ledger.isClean();
  });
});
