import type { Request, Response } from 'express';
import { get, keepAliveAgent } from './support/http';
import { failOnWarnings } from './support/warnings';
import { type Handler, useBench } from './support/wire';

failOnWarnings();

/** JavaScript looks a method up before it waits for the argument, so it is Node's own that is called, not the gate's. */
const ways: [string, (req: Request, res: Response, name: string) => Promise<unknown>, string][] = [
  ['res.end(await ...)', async (req, res, name) => res.end(await insert(req, name)), 'a'],
  [
    'res.end(await ...) behind a writeHead',
    async (req, res, name) => res.writeHead(201, { 'X-Told': 'yes' }).end(await insert(req, name)),
    'a',
  ],
  [
    'res.end(await ...) with a length of its own',
    async (req, res, name) => res.setHeader('Content-Length', 1).end(await insert(req, name)),
    'a',
  ],
  [
    'res.write(await ...) and res.end()',
    async (req, res, name) => {
      res.write(await insert(req, name));
      res.end('!');
    },
    'a!',
  ],
  [
    'res.write(await ...) and its own end',
    async (req, res, name) => {
      const { end } = res;
      res.write(await insert(req, name));
      Reflect.apply(end, res, ['!']);
    },
    'a!',
  ],
  [
    'flushHeaders, looked up before',
    async (req, res, name) => {
      const { flushHeaders } = res;
      const text = await insert(req, name);
      flushHeaders.call(res);
      res.end(text);
    },
    'a',
  ],
];

async function insert(req: Request, name: string): Promise<string> {
  await req.session('items').insert({ name });
  return name;
}

describe('when a method of the response is looked up before the first statement', () => {
  const bench = useBench();
  const agent = keepAliveAgent();
  afterAll(() => agent.destroy());
  const ask = (handler: Handler) => bench.answer(handler, { agent });

  describe.each(ways)('%s', (_way, answer, body) => {
    it('leaves after COMMIT, and the next request on its connection is served', async () => {
      let storedBefore: unknown;
      bench.proxy.onBackend(async (message) => {
        if (message.type === 'C' && message.text === 'COMMIT') storedBefore = await bench.stored();
      });
      const first = await ask((req, res) => answer(req, res, 'a'));
      expect(first).toMatchObject({ body, complete: true });
      expect([200, 201]).toContain(first.status);
      expect(await bench.stored()).toEqual(['a']);
      expect(storedBefore).toEqual(['a']);
      expect((await ask((_req, res) => res.end('next'))).body).toBe('next');
    });

    it('is discarded if COMMIT fails: 500, and nothing of it', async () => {
      await bench.database.admin('items').insert({ name: 'a' });
      const refused = await ask((req, res) => answer(req, res, 'a'));
      expect(refused).toMatchObject({ status: 500, complete: true });
      expect(JSON.parse(refused.body)).toMatchObject({ code: '23505' });
      expect(await bench.stored()).toEqual(['a']);
      expect((await ask((_req, res) => res.end('next'))).body).toBe('next');
    });
  });

  it('tells a listener of finish when it has left', async () => {
    const told: string[] = [];
    const url = bench.route(async (req, res) => {
      res.on('finish', () => told.push(req.session.outcome));
      return res.end(await insert(req, 'a'));
    });
    await get(url);
    expect(told).toEqual(['committed']);
  });
});
