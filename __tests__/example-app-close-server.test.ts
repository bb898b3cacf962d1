import { once } from 'node:events';
import { Agent, createServer, get, type IncomingMessage, type ServerResponse } from 'node:http';
import { type AddressInfo, connect } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { sessionMiddleware } from 'express-knex-session';
import createKnex from 'knex';
import { closeServer } from '../example-app/close-server';

const sessions = sessionMiddleware(createKnex({ client: 'pg' })); // Nobody uses one here.

describe('when a response is under way', () => {
  it('closes its connection afterwards, instead of waiting for the next request', async () => {
    const { server, answer, response, agent } = await underWay();

    const closed = closeServer(server, sessions, { lingerMs: 60_000 });
    answer.end();
    (await response).resume();

    await closed;
    agent.destroy();
  });

  it('lets it arrive, also at a slow reader', async () => {
    const { server, answer, response, agent } = await underWay();
    const size = 20_000_000; // More than all buffers on the way hold.

    const closed = closeServer(server, sessions, { lingerMs: 60_000 });
    answer.end(Buffer.alloc(size));
    const message = await response;
    await delay(200); // For whatever looks for idle connections from time to time.
    let received = 0;
    for await (const chunk of message) received += (chunk as Buffer).length;

    expect(received).toBe(size);
    await closed;
    agent.destroy();
  });

  it('cuts it if it takes too long', async () => {
    const { server, response, agent } = await underWay();

    await closeServer(server, sessions, { lingerMs: 50 });

    await expect(response).rejects.toThrow('socket hang up');
    agent.destroy();
  });
});

describe('when a client has connected and sends nothing', () => {
  it('does not wait for it for ever', async () => {
    const server = createServer().listen(0);
    const client = connect((server.address() as AddressInfo).port);
    await once(server, 'connection');

    await closeServer(server, sessions, { lingerMs: 50 });

    await once(client, 'close');
  });
});

async function underWay() {
  const server = createServer().listen(0);
  const agent = new Agent({ keepAlive: true });
  const response = once(get({ port: (server.address() as AddressInfo).port, agent }), 'response').then(
    ([message]) => message as IncomingMessage,
  );
  response.catch(() => {});
  const [, answer] = (await once(server, 'request')) as [unknown, ServerResponse];
  return { server, agent, answer, response };
}
