import { setImmediate as nextTurn } from 'node:timers/promises';
import type { ErrorRequestHandler, Request, Response } from 'express';
import { type AppOptions, REFUSED, useGatedApps } from './support/gated-app';
import { RawClient } from './support/http';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { requestFor } from './support/wire-comparison';

failOnWarnings();

const apps = useGatedApps();

const HTTP_10 = 'GET / HTTP/1.0\r\n\r\n';

/** Runs a handler that has inserted an entry; gives what the client has received when the connection has ended. */
async function stream(
  work: (req: Request, res: Response) => unknown,
  options: AppOptions = {},
  request = requestFor('GET', 'Connection: close'),
) {
  const { port } = await apps.gated(
    async (req, res) => {
      await req.session('entries').insert({ name: 'entry' });
      return work(req, res);
    },
    { commitAt: 'end', ...options },
  );
  const client = await RawClient.connect(port);
  const error = await client.write(request).closed;
  await eventually(() => expect(poolUsage(apps.knex).used).toBe(0));
  return { received: client.received, error };
}

/** Writes, lets the bytes go, and throws. */
const failInTheMiddle = async (_req: Request, res: Response) => {
  res.write('aa');
  await nextTurn();
  await nextTurn();
  throw new Error('in the middle');
};

const handlers: Record<string, ErrorRequestHandler[]> = {
  'Express itself': [],
  'a handler that passes on': [(error, _req, res, next) => (res.headersSent ? next(error) : res.end('sorry'))],
  'a handler that ends the response, as if it could still change it': [(_error, _req, res, _next) => res.status(500).end('sorry')],
  'a handler that writes and ends later': [
    async (_error, _req, res, _next) => {
      res.write('sor');
      await nextTurn();
      res.end('ry');
    },
  ],
  'a handler that destroys the response': [(_error, _req, res, _next) => void res.destroy()],
};

describe("when a handler fails after bytes of a success have left, with commitAt: 'end'", () => {
  describe.each([
    ['chunked', requestFor('GET', 'Connection: close')],
    ['HTTP/1.0, whose end is the end of the connection', HTTP_10],
  ])('%s', (_name, request) => {
    it.each(Object.keys(handlers))(
      'rolls back, tells the error handlers, and ends the connection so that it looks like no success: %s (43)',
      async (name) => {
        const told: unknown[] = [];
        const tell: ErrorRequestHandler = (error, _req, _res, next) => {
          told.push(error.message);
          next(error);
        };
        const { received, error } = await stream(failInTheMiddle, { errorHandlers: [tell, ...(handlers[name] ?? [])] }, request);
        expect(received).toMatch(/^HTTP\/1.1 200 OK/);
        expect(received).not.toMatch(/0\r\n\r\n$/);
        if (request === HTTP_10) expect(error).toMatchObject({ code: 'ECONNRESET' });
        expect(told).toEqual(['in the middle']);
        expect(await apps.names()).toEqual([]);
      },
    );
  });

  it('does so as well with the default commitAt, once the session has settled (43)', async () => {
    const { received, error } = await stream(failInTheMiddle, { commitAt: 'head' });
    expect(received).not.toMatch(/0\r\n\r\n$/);
    expect(await apps.names()).toEqual(['entry']);
    // The success had been stored: a plain app's end of the connection is no lie.
    expect([undefined, 'ECONNRESET']).toContain(error?.code);
  });
});

describe("when the status changes after bytes have left, with commitAt: 'end'", () => {
  it.each([
    { sent: 200, later: 500, names: ['entry'] },
    { sent: 404, later: 200, names: [] },
  ])('decides by the one that was sent: $sent, then $later', async ({ sent, later, names }) => {
    const { received } = await stream(async (_req, res) => {
      res.status(sent).write('aa');
      await nextTurn();
      res.status(later).end();
    });
    expect(received).toMatch(new RegExp(`^HTTP/1.1 ${sent} .*aa\r\n0\r\n\r\n$`, 's'));
    expect(await apps.names()).toEqual(names);
  });
});

describe("when a streamed success is not to be stored, with commitAt: 'end'", () => {
  it('completes the response if that was wished for: setRollbackOnly (14)', async () => {
    const { received, error } = await stream(async (req, res) => {
      req.session.setRollbackOnly();
      res.write('aa');
      await nextTurn();
      res.end();
    });
    expect(received).toMatch(/0\r\n\r\n$/);
    expect(error).toBeUndefined();
    expect(await apps.names()).toEqual([]);
  });

  it('completes the response if that was wished for: shouldCommit (13)', async () => {
    const { received } = await stream(
      async (_req, res) => {
        res.write('aa');
        await nextTurn();
        res.end();
      },
      { shouldCommit: () => false },
    );
    expect(received).toMatch(/0\r\n\r\n$/);
    expect(await apps.names()).toEqual([]);
  });

  it.each<[string, AppOptions]>([
    [
      'shouldCommit throws',
      {
        shouldCommit: () => {
          throw new Error('undecided');
        },
      },
    ],
    ['shouldCommit returns a promise', { shouldCommit: (async () => true) as never }],
  ])('resets the connection and tells onError if it was not: %s', async (_name, options) => {
    const { received, error } = await stream(async (_req, res) => {
      res.write('aa');
      await nextTurn();
      res.end();
    }, options);
    expect(received).not.toMatch(/0\r\n\r\n$/);
    expect(error).toMatchObject({ code: 'ECONNRESET' });
    expect(apps.reported).toHaveLength(1);
    expect(await apps.names()).toEqual([]);
  });

  it('resets the connection if a swallowed error has aborted the transaction (20)', async () => {
    const { received, error } = await stream(async (req, res) => {
      res.write('aa');
      await req.session.raw('SELECT 1/0').catch(() => {});
      res.end();
    });
    expect(received).not.toMatch(/0\r\n\r\n$/);
    expect(error).toMatchObject({ code: 'ECONNRESET' });
    expect(apps.reported).toEqual([expect.objectContaining({ code: 'ERR_TRANSACTION_ABORTED' })]);
    expect(await apps.names()).toEqual([]);
  });
});

describe("when a client disconnects from a streamed response, with commitAt: 'end'", () => {
  it('rolls back, and gives the connection back', async () => {
    const { port } = await apps.gated(
      async (req, res) => {
        await req.session('entries').insert({ name: 'entry' });
        res.write('aa');
      },
      { commitAt: 'end' },
    );
    const client = await RawClient.connect(port);
    await client.get('/').readUntil('aa');
    await client.reset();
    await eventually(() => expect(poolUsage(apps.knex).used).toBe(0));
    expect(await apps.names()).toEqual([]);
  });

  it('leaves COMMIT to finish if it is under way (30)', async () => {
    const { port } = await apps.gated(
      async (req, res) => {
        await req.session('entries').insert({ name: 'entry' });
        res.write('aa');
        await nextTurn();
        res.end();
      },
      { commitAt: 'end' },
    );
    const hold = apps.hold();
    const client = await RawClient.connect(port);
    client.get('/');
    await hold.reached;
    await client.readUntil('aa');
    await client.reset();
    hold.release();
    await eventually(async () => expect(await apps.names()).toEqual(['entry']));
    await eventually(() => expect(poolUsage(apps.knex).used).toBe(0));
  });
});

describe('when the last word of a streamed response is refused at COMMIT', () => {
  it.each([
    ['chunked', requestFor('GET', 'Connection: close')],
    ['HTTP/1.0', HTTP_10],
  ])('never looks complete to its client: %s (19, 42)', async (_name, request) => {
    const { received, error } = await stream(
      async (req, res) => {
        res.write('aa');
        await req.session('entries').insert({ name: REFUSED });
        res.end('bb');
      },
      {},
      request,
    );
    expect(received).not.toMatch(/0\r\n\r\n$/);
    expect(error).toMatchObject({ code: 'ECONNRESET' });
    expect(await apps.names()).toEqual([]);
  });
});
