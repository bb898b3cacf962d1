import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Response } from 'express';
import { type AppOptions, deferred, REFUSED, useGatedApps } from './support/gated-app';
import { get, RawClient } from './support/http';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { describeError } from './support/wire-comparison';

failOnWarnings();

const apps = useGatedApps();

const answering = (name: string, answer: (res: Response) => unknown, options: AppOptions = {}) =>
  apps.gated(
    async (req, res) => {
      await req.session('entries').insert({ name });
      return answer(res);
    },
    { commitAt: 'finish', ...options },
  );

const untilSettled = () => eventually(() => expect(poolUsage(apps.knex).used).toBe(0));

describe("when the session is settled after the response, with commitAt: 'finish'", () => {
  it('leaves only a mark on the response', async () => {
    const own: string[][] = [];
    const { url } = await apps.gated(
      async (req, res) => {
        own.push(Reflect.ownKeys(res).map(String));
        await req.session('entries').insert({ name: 'entry' });
        own.push(Reflect.ownKeys(res).map(String));
        res.end();
      },
      { commitAt: 'finish' },
    );
    await get(url);
    expect(own[1]).toEqual([...(own[0] ?? []), 'Symbol(express-knex-session.used)']);
    await untilSettled();
  });

  it('sends the response before COMMIT: the client may not find the row yet (promise 1 does not hold, hazard 31)', async () => {
    const { url } = await answering('entry', (res) => res.status(201).json({ ok: true }));
    const hold = apps.hold();
    expect(await get(url)).toMatchObject({ status: 201, body: '{"ok":true}', complete: true });
    await hold.reached;
    expect(await apps.names()).toEqual([]);
    hold.release();
    await untilSettled();
    expect(await apps.names()).toEqual(['entry']);
  });

  it('tells the client of a success, and onError of the COMMIT that failed (promise 1 does not hold)', async () => {
    const { url } = await answering(REFUSED, (res) => res.status(201).json({ ok: true }));
    expect(await get(url)).toMatchObject({ status: 201, complete: true });
    await eventually(() => expect(apps.reported).toEqual([expect.objectContaining({ code: '23514' })]));
    expect(await apps.names()).toEqual([]);
    await untilSettled();
  });

  it('tells onError of a swallowed error', async () => {
    const { url } = await apps.gated(
      async (req, res) => {
        await req.session.raw('SELECT 1/0').catch(() => {});
        res.json({ ok: true });
      },
      { commitAt: 'finish' },
    );
    expect(await get(url)).toMatchObject({ status: 200 });
    await eventually(() => expect(apps.reported).toEqual([expect.objectContaining({ code: 'ERR_TRANSACTION_ABORTED' })]));
  });

  it('tells onError of a shouldCommit that throws, and rolls back', async () => {
    const { url } = await answering('entry', (res) => res.json({ ok: true }), {
      shouldCommit: () => {
        throw new Error('undecided');
      },
    });
    expect(await get(url)).toMatchObject({ status: 200 });
    await eventually(() => expect(apps.reported).toEqual([expect.objectContaining({ message: 'undecided' })]));
    await untilSettled();
    expect(await apps.names()).toEqual([]);
  });

  it.each([[400], [500]])('rolls back after a response with status %d', async (status) => {
    const { url } = await answering('entry', (res) => res.sendStatus(status));
    expect(await get(url)).toMatchObject({ status });
    await untilSettled();
    expect(await apps.names()).toEqual([]);
  });

  it('rolls back if the handler throws, before its error handlers answer (11)', async () => {
    const outcomes: unknown[] = [];
    const { url } = await answering(
      'entry',
      () => {
        throw new Error('no');
      },
      {
        errorHandlers: [
          (_error, req, res, _next) => {
            outcomes.push(req.session.outcome);
            res.status(200).end('all is well');
          },
        ],
      },
    );
    expect(await get(url)).toMatchObject({ status: 200 });
    expect(outcomes).toEqual(['rolled back']);
    expect(await apps.names()).toEqual([]);
  });

  it('runs statements between the first byte and the end, and refuses them afterwards', async () => {
    const seen: string[] = [];
    const done = deferred();
    const { url } = await apps.gated(
      async (req, res) => {
        const insert = (name: string) =>
          req
            .session('entries')
            .insert({ name })
            .then(() => name, describeError);
        seen.push(await insert('first'));
        res.write('a');
        await nextTurn();
        seen.push(await insert('second'));
        res.end('b');
        await new Promise((resolve) => res.once('close', resolve));
        await eventually(() => expect(req.session.outcome).toBe('committed'));
        seen.push(await insert('third'));
        done.resolve();
      },
      { commitAt: 'finish' },
    );
    expect(await get(url)).toMatchObject({ body: 'ab', complete: true });
    await done.promise;
    expect(seen).toEqual(['first', 'second', expect.stringMatching(/^ERR_SESSION_CLOSED: /)]);
    await eventually(async () => expect(await apps.names()).toEqual(['first', 'second']));
  });

  it('rolls back if the client disconnects before the response ends (29)', async () => {
    const { port } = await answering('entry', (res) => res.write('a'));
    const client = await RawClient.connect(port);
    await client.get('/').readUntil('a\r\n');
    await client.reset();
    await untilSettled();
    expect(await apps.names()).toEqual([]);
  });
});
