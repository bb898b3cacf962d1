import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Request, Response } from 'express';
import { type AppOptions, deferred, REFUSED, useGatedApps } from './support/gated-app';
import { get, RawClient } from './support/http';
import { failOnWarnings } from './support/warnings';
import { describeError } from './support/wire-comparison';

failOnWarnings();

const apps = useGatedApps();

/** What becomes of a statement. */
const insert = (req: Request, name: string): Promise<string> =>
  req
    .session('entries')
    .insert({ name })
    .then(() => 'inserted', describeError);

const begin: Record<string, (res: Response) => unknown> = {
  write: (res) => res.write('a'),
  flushHeaders: (res) => res.flushHeaders(),
  'writeHead and write': (res) => res.writeHead(200).write('a'),
};
const begins = Object.keys(begin).map((name) => [name]);

describe("when the response has begun, with commitAt: 'head'", () => {
  it.each(begins)('refuses a later statement by a name that says how to have it: %s', async (name) => {
    const seen: string[] = [];
    const { url } = await apps.gated(async (req, res) => {
      await insert(req, 'before');
      begin[name]?.(res);
      await nextTurn();
      await nextTurn();
      seen.push(await insert(req, 'after'));
      res.end('b');
    });
    expect(await get(url)).toMatchObject({ status: 200, complete: true });
    expect(seen).toEqual([expect.stringMatching(/^ERR_SESSION_CLOSED: .*commitAt: 'end'/)]);
    expect(await apps.names()).toEqual(['before']);
  });

  it.each(begins)('still runs what was issued in the same turn, and stores it: %s (hazard 22)', async (name) => {
    const seen: string[] = [];
    const { url } = await apps.gated(async (req, res) => {
      await insert(req, 'before');
      const together = insert(req, 'together');
      begin[name]?.(res);
      seen.push(...(await Promise.all([together, insert(req, 'in the same turn')])));
      res.end('b');
    });
    expect(await get(url)).toMatchObject({ status: 200, complete: true });
    expect(seen).toEqual(['inserted', 'inserted']);
    expect(await apps.names()).toEqual(['before', 'together', 'in the same turn']);
  });

  it('refuses one that comes while COMMIT is under way', async () => {
    const late = deferred<string>();
    const goOn = deferred();
    const { url } = await apps.gated(async (req, res) => {
      await insert(req, 'before');
      res.write('a');
      await goOn.promise;
      late.resolve(await insert(req, 'late'));
      res.end('b');
    });
    const hold = apps.hold();
    const answer = get(url);
    await hold.reached;
    goOn.resolve();
    expect(await late.promise).toMatch(/^ERR_SESSION_CLOSED: /);
    hold.release();
    expect(await answer).toMatchObject({ status: 200, body: 'ab', complete: true });
    expect(await apps.names()).toEqual(['before']);
  });

  it('cuts the connection if the handler throws that error', async () => {
    const errors: unknown[] = [];
    const { url } = await apps.gated(
      async (req, res) => {
        await insert(req, 'before');
        res.write('a');
        await nextTurn();
        await nextTurn();
        await req.session('entries').insert({ name: 'late' });
        res.end('b');
      },
      {
        errorHandlers: [
          (error, _req, res, next) => {
            errors.push([error.code, res.headersSent]);
            next(error);
          },
        ],
      },
    );
    const answer = await get(url);
    expect(answer).toMatchObject({ complete: false });
    expect(errors).toEqual([['ERR_SESSION_CLOSED', true]]);
    expect(await apps.names()).toEqual(['before']);
  });
});

describe('when the response has ended', () => {
  it.each<[string, AppOptions]>([
    ['head', {}],
    ['end', { commitAt: 'end' }],
  ])('refuses a later statement by name, and points to withSession: %s (32)', async (_name, options) => {
    const seen = deferred<string>();
    const { url } = await apps.gated(async (req, res) => {
      await insert(req, 'before');
      res.end('a');
      await nextTurn();
      await nextTurn();
      seen.resolve(await insert(req, 'after'));
    }, options);
    await get(url);
    expect(await seen.promise).toMatch(/^ERR_SESSION_CLOSED: .*withSession\(\)/);
    expect(await apps.names()).toEqual(['before']);
  });

  it('refuses the first statement too', async () => {
    const seen = deferred<string>();
    const { url } = await apps.gated(async (req, res) => {
      res.end('a');
      seen.resolve(await insert(req, 'first'));
    });
    await get(url);
    expect(await seen.promise).toMatch(/^ERR_SESSION_CLOSED: .*withSession\(\)/);
    expect(await apps.names()).toEqual([]);
  });
});

describe('when the first statement comes after bytes have left', () => {
  const commit = async (options: AppOptions, handler: (req: Request, res: Response, note: (value: string) => void) => unknown) => {
    const seen: string[] = [];
    const { port } = await apps.gated((req, res) => handler(req, res, (value) => seen.push(value)), options);
    const client = await RawClient.connect(port);
    const error = await client.get('/', 'Connection: close').closed;
    return { seen, received: client.received, error };
  };

  it.each(begins)("refuses it with commitAt: 'head', and names 'end': %s", async (name) => {
    const { seen, received } = await commit({}, async (req, res, note) => {
      begin[name]?.(res);
      note(await insert(req, 'first'));
      res.end('b');
    });
    // A head that was only written down has not left.
    expect(seen).toEqual([expect.stringMatching(/^ERR_SESSION_CLOSED: .*commitAt: 'end'/)]);
    expect(received).toMatch(/^HTTP\/1.1 200 OK.*0\r\n\r\n$/s);
    expect(await apps.names()).toEqual([]);
  });

  it.each(begins)("takes it with commitAt: 'end', and withholds the end until COMMIT: %s", async (name) => {
    const hold = apps.hold();
    const result = commit({ commitAt: 'end' }, async (req, res, note) => {
      begin[name]?.(res);
      note(await insert(req, 'first'));
      res.end('b');
    });
    await hold.reached;
    hold.release();
    expect(await result).toMatchObject({ seen: ['inserted'], received: expect.stringMatching(/0\r\n\r\n$/), error: undefined });
    expect(await apps.names()).toEqual(['first']);
  });

  it.each(begins)("resets the connection with commitAt: 'end' if COMMIT fails: %s", async (name) => {
    const { received, error } = await commit({ commitAt: 'end' }, async (req, res) => {
      begin[name]?.(res);
      await insert(req, REFUSED);
      res.end('b');
    });
    expect(received).not.toMatch(/0\r\n\r\n$/);
    expect(error?.code).toBe('ECONNRESET');
    expect(apps.reported).toEqual([expect.objectContaining({ code: '23514' })]);
    expect(await apps.names()).toEqual([]);
  });

  it.each<[string, (res: Response) => unknown]>([
    ['declares a length', (res) => res.set('Content-Length', '2').write('a')],
    [
      'is delimited by the end of the connection',
      (res) => res.set('Connection', 'close').removeHeader('Transfer-Encoding') ?? res.write('a'),
    ],
  ])("refuses it with commitAt: 'end' too if the head that has left %s, with advice that fits", async (_name, start) => {
    const { seen } = await commit({ commitAt: 'end' }, async (req, res, note) => {
      start(res);
      note(await insert(req, 'first'));
      res.end('b');
    });
    expect(seen).toEqual([expect.stringMatching(/^ERR_SESSION_CLOSED: /)]);
    expect(seen[0]).not.toMatch(/commitAt: 'end'/);
    expect(await apps.names()).toEqual([]);
  });
});
