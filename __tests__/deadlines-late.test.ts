import { PassThrough } from 'node:stream';
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Request, Response } from 'express';
import { openSite } from './support/deadlines';
import { RawClient } from './support/http';
import { flavours, insert, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';
import { deferred } from './support/wire';

failOnWarnings();
const ledger = useLedger();

/** What a handler may still do when its request has been answered with an error. */
const lateActs: [string, (req: Request, res: Response, next: () => void) => unknown][] = [
  ['throws', () => Promise.reject(new Error('late'))],
  ['runs a statement', (req) => insert(req, 'late')],
  ['answers', (_req, res) => void res.status(201).json({ stored: true })],
  [
    'writes and ends',
    (_req, res) => {
      res.write('late');
      res.end();
    },
  ],
  ['pipes', (_req, res) => void res.sendFile(__filename)],
  ['sets a header', (_req, res) => void res.set('X-Late', 'yes')],
  ['redirects', (_req, res) => void res.redirect('/late')],
  ['flushes its head', (_req, res) => void res.flushHeaders()],
  ['calls next()', (_req, _res, next) => next()],
  ['does nothing', () => {}],
];

describe.each(flavours)('when a handler goes on after its transaction has timed out, on $version', (flavour) => {
  it.each(lateActs)('sends the error alone, and stores nothing: it %s', async (_what, act) => {
    const goOn = deferred();
    const done = deferred();
    const site = await openSite(
      ledger,
      async (req, res, next) => {
        await insert(req, 'a').catch(() => {});
        await goOn.promise;
        try {
          await act(req, res, next);
        } finally {
          done.resolve();
        }
      },
      { flavour, transactionTimeout: 40 },
    );
    const client = await RawClient.connect(site.port);
    client.get('/');
    await client.readUntil('"ERR_SESSION_TIMEOUT"');
    goOn.resolve();
    await done.promise;
    await client.closed;
    expect(client.received.match(/HTTP\/1\.1/g)).toHaveLength(1);
    expect(client.received).toMatch(/^HTTP\/1\.1 503 .*\r\nConnection: close\r\n/s);
    expect(client.received).not.toMatch(/late|stored/i);
    expect(site.errors).toHaveLength(1);
    expect(await ledger.stored()).toEqual([]);
  });

  it('keeps a connection whose response was piped, whatever is thrown late: the next request may be under way on it (37)', async () => {
    const goOn = deferred();
    const done = deferred();
    const site = await openSite(
      ledger,
      async (req, res) => {
        if (req.url === '/next') {
          goOn.resolve();
          await done.promise;
          // The late error goes through Express meanwhile.
          for (let turn = 0; turn < 3; turn++) await nextTurn();
          res.send('served');
          return;
        }
        await insert(req, 'a');
        // As `pipeline()` does, which is told late that the response has closed before the end of its rows.
        new PassThrough().pipe(res);
        await goOn.promise;
        done.resolve();
        throw new Error('late');
      },
      { flavour, transactionTimeout: 40 },
    );
    const client = await RawClient.connect(site.port);
    client.get('/');
    await client.readUntil('"ERR_SESSION_TIMEOUT"');
    client.get('/next');
    await Promise.race([client.closed, client.readUntil('served')]);
    expect(client.received).toMatch(/^HTTP\/1\.1 503 .*\r\n\r\nserved$/s);
    client.destroy();
  });

  // The moment in which the connection is back, and the error handler has not answered yet.
  it.each(lateActs)('does so while an error handler takes its time: it %s', async (_what, act) => {
    const handling = deferred();
    const done = deferred();
    const mayAnswer = deferred();
    const site = await openSite(
      ledger,
      async (req, res, next) => {
        await insert(req, 'a').catch(() => {});
        await handling.promise;
        try {
          await act(req, res, next);
        } finally {
          done.resolve();
        }
      },
      {
        flavour,
        transactionTimeout: 40,
        errorHandlers: (errors) => [
          async (error: any, _req: Request, res: Response, _next: unknown) => {
            errors.push(error);
            handling.resolve();
            await mayAnswer.promise;
            res.status(error.status).json({ code: error.code });
          },
        ],
      },
    );
    const answer = site.get();
    await done.promise;
    // The rejection of the late act is on its way through Express.
    for (let turn = 0; turn < 3; turn++) await new Promise(setImmediate);
    mayAnswer.resolve();
    expect(await answer).toMatchObject({ status: 503, body: '{"code":"ERR_SESSION_TIMEOUT"}', complete: true });
    expect((await answer).headers).not.toHaveProperty('x-late');
    expect(site.errors).toHaveLength(1);
    expect(await ledger.stored()).toEqual([]);
  });

  it('reports a late error of its own, once, or leaves it to Express, but never answers by it', async () => {
    const goOn = deferred();
    const late = new Error('late');
    const site = await openSite(
      ledger,
      async (req) => {
        await insert(req, 'a').catch(() => {});
        await goOn.promise;
        throw late;
      },
      { flavour, transactionTimeout: 40 },
    );
    const answer = await site.get();
    goOn.resolve();
    for (let turn = 0; turn < 3; turn++) await new Promise(setImmediate);
    expect(answer.body).toContain('ERR_SESSION_TIMEOUT');
    expect(site.errors).toHaveLength(1);
    expect(site.reported.filter((error) => error !== late)).toEqual([]);
  });
});
