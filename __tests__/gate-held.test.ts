import type { Server } from 'node:http';
import type { Response } from 'express';
import { useGatedApps } from './support/gated-app';
import { get, keepAliveAgent, RawClient, request } from './support/http';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { attempt, type Cases, expectSameAsPlain, inserting, listed, stateOf, withoutDates } from './support/wire-comparison';

failOnWarnings();

const apps = useGatedApps();

const laterChanges: Cases = {
  'a second json': (_req, res, note) => {
    res.json({ one: 1 });
    note(attempt(() => res.status(500).json({ another: 'and longer' })));
  },
  'a second send, redirect and sendStatus': (_req, res, note) => {
    res.send('first');
    note(attempt(() => res.send('second, and longer')));
    note(attempt(() => res.redirect('/elsewhere')));
    note(attempt(() => res.sendStatus(404)));
  },
  'status and reason phrase': (_req, res) => {
    res.end('a');
    res.status(500);
    res.statusMessage = 'Too late';
  },
  headers: (_req, res, note) => {
    res.end('a');
    note(attempt(() => res.setHeader('X-A', '1')));
    note(attempt(() => res.appendHeader('X-A', '1')));
    note(attempt(() => res.setHeaders(new Headers({ a: 'b' }))));
    note(attempt(() => res.removeHeader('X-Powered-By')));
    note(attempt(() => res.cookie('a', 'b')));
    note(attempt(() => res.writeHead(404)));
    note(attempt(() => res.flushHeaders()));
    note(res.getHeaders());
  },
  state: (_req, res, note) => {
    res.end('a');
    note(stateOf(res));
  },
};

describe('when a handler goes on after its response has ended, and COMMIT is under way', () => {
  it.each(listed(laterChanges))(
    'sends the first response, and refuses what plain Express refuses: %s (hazard 25)',
    async (_name, handler) => {
      const { bytes } = await expectSameAsPlain(apps, inserting(handler));
      // The request that follows on the same connection is answered in step.
      expect(bytes).toMatch(/\r\n\r\nthe end$/);
    },
  );

  // In a plain app the response has left by now, so that its `finish` comes first. All else is the same.
  it.each(
    listed({
      'end with a chunk': (_req, res, note) => note(attempt(() => res.end('b', (error?: Error) => note(['callback', codeOf(error)])))),
      'end with a callback': (_req, res, note) => note(attempt(() => res.end((error?: Error) => note(['callback', codeOf(error)])))),
      'a write': (_req, res, note) => note(attempt(() => res.write('b', (error) => note(['callback', codeOf(error)])))),
    }),
  )('answers as Node does after the end: %s', async (_name, handler) => {
    const notes: unknown[][] = [];
    const run = async (kind: 'plain' | 'gated') => {
      const seen: unknown[] = [];
      notes.push(seen);
      const note = (value: unknown) => seen.push(value);
      const { url } = await apps[kind](async (req, res, next) => {
        res.on('error', (error) => note(['error', codeOf(error)])).on('close', () => note('close'));
        await req.session('entries').insert({ name: 'entry' });
        res.end('a');
        await handler(req, res, note, next);
      });
      expect(await get(url)).toMatchObject({ status: 200, body: 'a', complete: true });
    };
    await run('plain');
    await run('gated');
    const [plain, gated] = notes;
    expect(gated).toEqual(plain);
    expect(gated).toContain('close');
  });
});

const codeOf = (error: unknown): string | undefined => (error as NodeJS.ErrnoException | undefined)?.code;

const ends: [string, (res: Response) => unknown][] = [
  ['throws', () => fail()],
  ['destroys the socket', (res) => res.socket?.destroy()],
  ['destroys the response', (res) => res.destroy()],
];

function fail(): never {
  throw new Error('too late');
}

describe('when a handler breaks off after its response, and COMMIT is under way', () => {
  it.each(ends)('sends what a plain app has sent by then, and then the connection ends: it %s (hazard 26)', async (_name, breakOff) => {
    const run = async (kind: 'plain' | 'gated') => {
      const { port } = await apps[kind](async (req, res) => {
        await req.session('entries').insert({ name: 'entry' });
        res.cookie('a', 'b').status(201).json({ ok: true });
        breakOff(res);
      });
      const hold = kind === 'gated' ? apps.hold() : undefined;
      const client = await RawClient.connect(port);
      client.get('/');
      await hold?.reached;
      expect(hold ? client.received : '').toBe('');
      hold?.release();
      const error = await client.closed;
      return { bytes: withoutDates(client.received), error };
    };
    const plain = await run('plain');
    expect(plain.bytes).toMatch(/^HTTP\/1.1 201 Created.*\{"ok":true\}$/s);
    expect(await run('gated')).toEqual(plain);
    expect(await apps.names()).toEqual(['entry', 'entry']);
  });

  it('does so too if the late error comes a turn later, and keeps the outcome (26)', async () => {
    let goOn = (): void => {};
    const { url } = await apps.gated(async (req, res) => {
      await req.session('entries').insert({ name: 'entry' });
      const meanwhile = new Promise<void>((resolve) => {
        goOn = resolve;
      });
      res.json({ ok: true });
      await meanwhile;
      throw new Error('too late');
    });
    const hold = apps.hold();
    const answer = get(url);
    await hold.reached;
    goOn();
    await new Promise((resolve) => setImmediate(resolve));
    hold.release();
    expect(await answer).toMatchObject({ status: 200, body: '{"ok":true}', complete: true });
    expect(await apps.names()).toEqual(['entry']);
  });

  it('ends the connection at once if it destroys the socket with an error, and leaves COMMIT to finish (30)', async () => {
    const { port } = await apps.gated(async (req, res) => {
      res.socket?.on('error', () => {});
      await req.session('entries').insert({ name: 'entry' });
      res.json({ ok: true });
      res.socket?.destroy(new Error('broken'));
    });
    const hold = apps.hold();
    const client = await RawClient.connect(port);
    client.get('/');
    await hold.reached;
    await client.closed;
    expect(client.received).toBe('');
    hold.release();
    await eventually(async () => expect(await apps.names()).toEqual(['entry']));
    await eventually(() => expect(poolUsage(apps.knex).used).toBe(0));
  });
});

describe('when the server is being shut down while COMMIT is under way', () => {
  const answering = () =>
    apps.gated(async (req, res) => {
      await req.session('entries').insert({ name: 'entry' });
      res.json({ ok: true });
    });

  it.each<[string, (server: Server) => void]>([
    ['close()', () => {}],
    // What Node's documentation advised before close() did so by itself.
    ['close() and closeIdleConnections()', (server) => server.closeIdleConnections()],
  ])('still sends the response, and then lets the connection go: %s', async (_name, closeMore) => {
    const { url, server } = await answering();
    const hold = apps.hold();
    const agent = keepAliveAgent();
    const answer = request(url, { agent });
    await hold.reached;
    const closed = new Promise((resolve) => server.close(resolve));
    closeMore(server);
    hold.release();
    expect(await answer).toMatchObject({ status: 200, body: '{"ok":true}', complete: true });
    agent.destroy();
    await closed;
  });

  it('waits for nobody when it has to close all connections, and leaves COMMIT to finish', async () => {
    const { url, server } = await answering();
    const hold = apps.hold();
    const answer = request(url);
    await hold.reached;
    const closed = new Promise((resolve) => server.close(resolve));
    server.closeAllConnections();
    expect(await answer).toMatchObject({ status: 0, complete: false });
    await closed;
    hold.release();
    await eventually(async () => expect(await apps.names()).toEqual(['entry']));
  });
});
