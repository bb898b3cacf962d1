import { once } from 'node:events';
import type express from 'express';
import { deferred } from './support/gated-app';
import { keepAliveAgent, post, RawClient } from './support/http';
import { meetingPoint, waysToLeave } from './support/leaving';
import { flavours, insert, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();

describe.each(flavours)('on $version', (flavour) => {
  const serve = ledger.serving(flavour);
  const callFrom = async (port: number, path = '/') => (await RawClient.connect(port)).get(path);

  describe('when the server is shut down while an error handler hangs', () => {
    it('lets go of the connection', async () => {
      const point = meetingPoint();
      const { server, port } = await serve(
        async (req, res) => {
          await insert(req, 'a', 'fail');
          res.sendStatus(201);
        },
        { errorHandlers: [(_error, _req, _res, _next) => void point.arrive()] },
      );
      const client = await callFrom(port);
      await point.reached;
      server.close();
      server.closeAllConnections();
      await client.closed;
      await ledger.isClean();
    });
  });

  describe('when the connection is given up on our side', () => {
    const ways: [string, (req: express.Request, res: express.Response) => void][] = [
      ['res.destroy()', (_req, res) => void res.destroy()],
      ['req.destroy()', (req) => void req.destroy()],
      ['req.socket.destroy()', (req) => void req.socket.destroy()],
    ];
    it.each(ways)('by %s: rolls back', async (_, giveUp) => {
      const { port } = await serve(async (req, res) => {
        await insert(req, 'a');
        giveUp(req, res);
      });
      const client = await callFrom(port);
      await client.closed;
      expect(client.received).toBe('');
      await ledger.isClean();
      expect(await ledger.stored()).toEqual([]);
    });
  });

  describe('when a request has a body', () => {
    // Hazard 28: the request's own `close` comes with the end of its body.
    it('does not take its end for a disconnect', async () => {
      const served = await ledger.serve(flavour, (app) => {
        app.use(flavour.express.json());
        app.post(
          '/',
          flavour.route(async (req, res) => {
            const closed = req.closed || once(req, 'close');
            await insert(req, req.body.id);
            await closed;
            await insert(req, `${req.body.id}2`);
            res.sendStatus(201);
          }),
        );
      });
      expect(await post(served.url, { id: 'a' })).toMatchObject({ status: 201 });
      expect(await ledger.stored()).toEqual(['a', 'a2']);
    });

    it.each(waysToLeave)('rolls back if the client leaves in the middle of it (%s)', async (_, leave) => {
      const inserted = meetingPoint();
      const { port } = await serve(async (req) => {
        await insert(req, 'a');
        void inserted.arrive();
        for await (const _ of req);
      });
      const client = await RawClient.connect(port);
      client.write('POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf');
      await inserted.reached;
      await leave(client);
      await ledger.isClean();
      expect(await ledger.stored()).toEqual([]);
    });
  });

  describe('when a connection is kept alive', () => {
    it('leaves no listener behind on it, however the requests end', async () => {
      const agent = keepAliveAgent();
      const counts = new Set<number>();
      const { url } = await serve(async (req, res) => {
        counts.add(req.socket.listenerCount('close') + req.socket.listenerCount('error'));
        await insert(req, req.path, req.path.endsWith('3') ? 'fail' : undefined);
        if (req.path.endsWith('5')) throw new Error('mine');
        res.sendStatus(req.path.endsWith('7') ? 409 : 201);
      });
      for (let i = 0; i < 20; i++) await post(`${url}/${i}`, '', { agent });
      // The first request finds the socket without our one listener for all.
      expect(counts.size).toBeLessThanOrEqual(2);
      agent.destroy();
    });

    it('leaves none behind for requests that fail while others on it are before them', async () => {
      const counts: number[] = [];
      let fails = deferred();
      const { port } = await serve(async (req, res) => {
        if (req.path === '/earlier') {
          counts.push(req.socket.listenerCount('close'));
          await fails.promise;
          // Behind all that the error handlers do.
          await new Promise(setImmediate);
          res.sendStatus(204);
          return;
        }
        setTimeout(fails.resolve, 30);
        await insert(req, 'a', 'fail');
        res.sendStatus(201);
      });
      const client = await RawClient.connect(port);
      for (let i = 1; i <= 4; i++) {
        fails = deferred();
        client.get('/earlier').get('/later');
        await client.readUntil((received) => received.split('HTTP/1.1 ').length > 2 * i);
      }
      // The first request finds the socket without our one listener for all.
      expect(counts.slice(1)).toEqual([counts[1], counts[1], counts[1]]);
    });
  });
});
