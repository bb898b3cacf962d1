import { once } from 'node:events';
import { deferred, type Handler, REFUSED, useGatedApps } from './support/gated-app';
import { get, keepAliveAgent, RawClient, request } from './support/http';
import { eventually, poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';
import { withoutDates } from './support/wire-comparison';

failOnWarnings();

const apps = useGatedApps();

/** Answers by the path: /insert/NAME commits, /refused fails at COMMIT, /bad rolls back, /none uses no session. */
const answerByPath: Handler = async (req, res) => {
  const [, what, name] = req.path.split('/');
  if (what !== 'none') await req.session('entries').insert({ name: what === 'refused' ? REFUSED : (name ?? 'entry') });
  if (what === 'stream') {
    res.write(`${req.path} `);
    res.end('streamed');
  } else res.status(what === 'bad' ? 400 : 200).send(req.path);
};

const sayRefused = { errorHandlers: [((_error, _req, res, _next) => res.send('refused')) as import('express').ErrorRequestHandler] };

describe('when requests share a connection', () => {
  it('serves each one, whatever became of the one before it (38)', async () => {
    const { url, sockets } = await apps.gated(answerByPath, sayRefused);
    const agent = keepAliveAgent();
    const paths = ['/insert/a', '/refused', '/none', '/bad', '/stream/b', '/refused', '/insert/c', '/bad', '/none', '/stream/d'];
    const answers = [];
    for (const path of paths) {
      const { status, body, complete } = await get(url + path, { agent });
      answers.push([path, status, body, complete]);
    }
    expect(answers).toEqual(
      paths.map((path) => {
        if (path === '/refused') return [path, 500, 'refused', true];
        return [path, path === '/bad' ? 400 : 200, path.startsWith('/stream') ? `${path} streamed` : path, true];
      }),
    );
    expect(sockets).toHaveLength(1);
    expect(await apps.names()).toEqual(['a', 'b', 'c', 'd']);
    agent.destroy();
  });

  it('does not gather listeners on the socket', async () => {
    const { url, sockets } = await apps.gated(answerByPath, sayRefused);
    const agent = keepAliveAgent();
    const counts: number[] = [];
    let wrapped: unknown;
    for (let i = 0; i < 40; i++) {
      if (i === 20) wrapped = sockets[0]?.destroy;
      await get(`${url}${i % 2 ? '/insert/a' : '/refused'}`, { agent });
      const [socket] = sockets;
      counts.push((socket?.eventNames() ?? []).reduce((sum, name) => sum + (socket?.listenerCount(name) ?? 0), 0));
    }
    expect(sockets).toHaveLength(1);
    expect(Math.max(...counts.slice(20))).toBeLessThanOrEqual(Math.max(...counts.slice(0, 20)));
    // Nor wraps its methods anew for each response.
    expect(sockets[0]?.destroy).toBe(wrapped);
    agent.destroy();
  });
});

describe('when requests are pipelined', () => {
  const pipelined = (...paths: string[]) =>
    paths
      .map((path, i) => `GET ${path} HTTP/1.1\r\nHost: localhost\r\n${i === paths.length - 1 ? 'Connection: close\r\n' : ''}\r\n`)
      .join('');

  it('answers in order, byte for byte as plain Express does (38)', async () => {
    const requests = pipelined('/insert/a', '/none', '/stream/b', '/bad', '/stream/c', '/insert/d', '/none');
    const ask = async (kind: 'plain' | 'gated') => {
      const { port } = await apps[kind](answerByPath, sayRefused);
      const client = await RawClient.connect(port);
      await client.write(requests).closed;
      return withoutDates(client.received);
    };
    expect(await ask('gated')).toBe(await ask('plain'));
  });

  it('replaces only the response whose COMMIT fails', async () => {
    const { port } = await apps.gated(answerByPath, sayRefused);
    const client = await RawClient.connect(port);
    await client.write(pipelined('/insert/a', '/refused', '/insert/b', '/refused', '/none')).closed;
    const statuses = client.received.match(/HTTP\/1.1 \d+/g);
    expect(statuses).toEqual(['HTTP/1.1 200', 'HTTP/1.1 500', 'HTTP/1.1 200', 'HTTP/1.1 500', 'HTTP/1.1 200']);
    // They run at the same time.
    expect((await apps.names()).sort()).toEqual(['a', 'b']);
  });

  it('holds a response that waits behind another one, until its own COMMIT', async () => {
    const { port, sockets } = await apps.gated(answerByPath);
    const first = apps.hold();
    const client = await RawClient.connect(port);
    client.write(pipelined('/insert/a', '/none'));
    await first.reached;
    expect(sockets[0]?.bytesWritten).toBe(0);
    first.release();
    await client.closed;
    expect(client.received).toMatch(/\/insert\/a.*\/none/s);
  });

  it('sends a response whose handler throws afterwards, though its turn has not come when it ends (hazard 26)', async () => {
    const mayAnswer = deferred();
    const second = deferred();
    const { port } = await apps.gated(async (req, res) => {
      if (req.path === '/slow') {
        await mayAnswer.promise;
        return res.send('slow');
      }
      await req.session('entries').insert({ name: 'entry' });
      res.send('quick');
      second.resolve();
      // By then the slow one has been sent, and it is this one's turn.
      if (res.socket === null) await once(res, 'socket');
      throw new Error('too late');
    });
    const hold = apps.hold();
    const client = await RawClient.connect(port);
    client.write(pipelined('/slow', '/quick'));
    await hold.reached;
    await second.promise;
    mayAnswer.resolve();
    await client.readUntil('slow');
    await new Promise((resolve) => setImmediate(resolve));
    hold.release();
    await client.closed;
    expect(client.received).toMatch(/slow.*quick$/s);
    expect(await apps.names()).toEqual(['entry']);
  });

  it('rolls all of them back if the client resets the connection (hazard 28)', async () => {
    const waiting: (() => void)[] = [];
    const inserted = deferred();
    const { port } = await apps.gated(async (req, res) => {
      await req.session('entries').insert({ name: req.path });
      await new Promise<void>((resolve) => {
        waiting.push(resolve);
        if (waiting.length === 3) inserted.resolve();
      });
      res.send('never seen');
    });
    const client = await RawClient.connect(port);
    client.write(pipelined('/1', '/2', '/3'));
    await inserted.promise;
    await client.reset();
    await eventually(() => expect(poolUsage(apps.knex).used).toBe(0));
    for (const goOn of waiting) goOn();
    expect(await apps.names()).toEqual([]);
  });
});

describe('when the body of the request has been read', () => {
  it.each<[string, (req: import('express').Request) => Promise<unknown>]>([
    ['to its end', (req) => req.resume().once('end', () => {}) && once(req, 'close')],
    [
      'by a loop',
      async (req) => {
        for await (const _ of req);
        await new Promise((resolve) => setImmediate(resolve));
      },
    ],
  ])("does not take the request's close for a disconnect: %s (hazard 28)", async (_name, read) => {
    const { url } = await apps.gated(async (req, res) => {
      await req.session('entries').insert({ name: 'first' });
      await read(req);
      await req.session('entries').insert({ name: 'second' });
      res.json({ outcome: req.session.outcome });
    });
    const answer = await request(url, { method: 'POST', body: 'x'.repeat(100_000) });
    expect(answer).toMatchObject({ status: 200, body: '{"outcome":"open"}' });
    expect(await apps.names()).toEqual(['first', 'second']);
  });
});

describe('when a client reads what it has just written', () => {
  it('finds the row, right after the head of the response (8, hazard 31)', async () => {
    const { url } = await apps.gated(async (req, res) => {
      const name = req.path.slice(1);
      if (req.method === 'POST') {
        await req.session('entries').insert({ name });
        res.status(201).write('part');
        return res.end();
      }
      return res.json(await req.session('entries').where({ name }).pluck('name'));
    });
    const agents = Array.from({ length: 4 }, () => keepAliveAgent());
    await Promise.all(
      agents.map(async (agent, client) => {
        for (let i = 0; i < 50; i++) {
          expect((await request(`${url}/${client}-${i}`, { method: 'POST', agent })).status).toBe(201);
          expect((await get(`${url}/${client}-${i}`, { agent })).body).toBe(`["${client}-${i}"]`);
        }
        agent.destroy();
      }),
    );
  });
});

describe('when no statement is run', () => {
  it('does not touch the response (1, 3)', async () => {
    const describeResponse: Handler = (_req, res) => {
      const events = res.eventNames().map((name) => [String(name), res.listenerCount(name)]);
      // Not their order: see lib/object-shape.ts.
      res.json({ own: Reflect.ownKeys(res).map(String).sort(), events });
    };
    const [plain, { url }] = [await apps.plain(describeResponse), await apps.gated(describeResponse)];
    apps.proxy.reset();
    expect((await get(url)).body).toBe((await get(plain.url)).body);
    expect(apps.proxy.sql()).toEqual([]);
    expect(poolUsage(apps.knex).used).toBe(0);
  });
});
