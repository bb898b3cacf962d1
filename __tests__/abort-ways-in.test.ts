import type { LookupAddress } from 'node:dns';
import { isIPv6, Socket } from 'node:net';
import { networkInterfaces } from 'node:os';
import createKnex, { type Knex } from 'knex';
import { Client, type ClientConfig, Pool } from 'pg';
import { clientHasGone, ENDLESS, useAborts, used, type Victim } from './support/abort';
import { startCancelProxy } from './support/abort-proxy';
import { useReachableServer } from './support/abort-server';
import { insert } from './support/ledger';
import { eventually } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const server = useReachableServer();
const aborts = useAborts();
afterAll(() => server.stop());

const open = (knex: Knex, settleTimeout = 5_000): Promise<Victim> =>
  aborts.open(
    async (req) => {
      await insert(req, 'a');
      await req.session.raw(ENDLESS);
    },
    { knex, settleTimeout, onError: () => {} },
  );

/** The database of the tests, with another way to it. */
function to(way: ClientConfig): ClientConfig {
  const { hostname, port, username, password, pathname } = new URL(aborts.ledger.database.url);
  return { host: hostname, port: Number(port), user: username, password, database: pathname.slice(1), ...way };
}

const connect = (way: ClientConfig): Knex =>
  aborts.ledger.pool({ connection: to(way) as Knex.StaticConnectionConfig, pool: { min: 0, max: 1 } });

async function isAborted(knex: Knex): Promise<void> {
  const victim = await open(knex);
  await victim.isSleeping();
  await victim.client.reset();
  await victim.wasAborted();
}

/** Whether the server sees the connection as one with TLS, and from where. */
async function seenBy(knex: Knex): Promise<{ ssl: boolean; address: string | null }> {
  const { rows } = await knex.raw('SELECT ssl, host(inet_client_addr()) AS address FROM pg_stat_ssl WHERE pid = pg_backend_pid()');
  return rows[0];
}

describe('when the client leaves in a running statement of a connection', () => {
  describe('over TLS', () => {
    const ways: [string, () => ClientConfig][] = [
      ['with a certificate that is checked', () => ({ ssl: { ca: server.ca, rejectUnauthorized: true } as never })],
      ['to a host name, which the certificate is checked for', () => ({ host: 'localhost', ssl: { ca: server.ca } as never })],
      ['with a certificate that is not checked', () => ({ ssl: { rejectUnauthorized: false } })],
    ];
    it.each(ways)('%s: cancels it the same way', async (_, way) => {
      if (!server.ca) return console.warn('Not tested: there is no openssl.');
      const knex = connect(way());
      expect(await seenBy(knex)).toMatchObject({ ssl: true });
      await isAborted(knex);
    });

    it('which begins without being asked for (sslnegotiation=direct): cancels it the same way', async () => {
      if (!server.ca) return console.warn('Not tested: there is no openssl.');
      const url = new URL(aborts.ledger.database.url);
      url.searchParams.set('sslnegotiation', 'direct');
      url.searchParams.set('sslmode', 'no-verify');
      const knex = aborts.ledger.pool({ connection: url.href, pool: { min: 0, max: 1 } });
      expect(await seenBy(knex)).toMatchObject({ ssl: true });
      await isAborted(knex);
    });

    it.each([
      ['postgres', 'SSLRequest'],
      ['direct', 'TLS'],
    ])('sends nothing of it in the clear (sslnegotiation=%s)', async (negotiation, opening) => {
      if (!server.ca) return console.warn('Not tested: there is no openssl.');
      const proxy = await startCancelProxy(aborts.ledger.database.url);
      try {
        const url = `${proxy.url}?sslmode=no-verify&sslnegotiation=${negotiation}`;
        await isAborted(aborts.ledger.pool({ connection: url, pool: { min: 0, max: 1 } }));
        expect(proxy.openings.length).toBeGreaterThanOrEqual(2);
        expect(new Set(proxy.openings)).toEqual(new Set([opening]));
      } finally {
        await proxy.close();
      }
    });

    it('with a password that a function gives: cancels it without asking for that again', async () => {
      if (!server.ca) return console.warn('Not tested: there is no openssl.');
      const password = jest.fn(() => to({}).password as string);
      const knex = connect({ ssl: { rejectUnauthorized: false }, password });
      await isAborted(knex);
      expect(password).toHaveBeenCalledTimes(1);
    });
  });

  it('over a Unix socket: cancels it the same way', async () => {
    const knex = connect({ host: server.socketFolder });
    expect(await seenBy(knex)).toEqual({ ssl: false, address: null });
    await isAborted(knex);
  });

  const addresses = ['127.0.0.1', '::1'].filter((address) => address === '127.0.0.1' || hasIpv6());
  it.each(addresses)('to a host name with two addresses, of which it has reached %s: cancels it there', async (reached) => {
    const lookup = jest.fn((_name: string, _options: unknown, found: (error: null, addresses: LookupAddress[]) => void) => {
      found(null, [{ address: reached, family: isIPv6(reached) ? 6 : 4 }]);
    });
    // Looks the name up in its own way. A cancel that asked for it too would not find it, or find the other server.
    class Named extends Client {
      constructor(config: ClientConfig) {
        super(config);
        const { stream } = (this as unknown as { connection: { stream: Socket } }).connection;
        const { connect } = stream;
        stream.connect = ((port: number, host: string) => connect.call(stream, { port, host, lookup } as never)) as never;
      }
    }
    const pool = new Pool({ ...to({ host: 'db.invalid' }), max: 1, Client: Named } as never);
    const knex = createKnex({ client: 'pg', connectionPool: pool });
    try {
      expect(await seenBy(knex)).toMatchObject({ address: reached });
      await isAborted(knex);
      expect(lookup).toHaveBeenCalledTimes(1);
    } finally {
      await pool.end();
    }
  });

  describe("with pg's `stream`", () => {
    it('as a function: calls it once more, and cancels by that', async () => {
      const stream = jest.fn(throughSocket);
      await isAborted(connect({ host: 'nowhere.invalid', stream }));
      expect(stream).toHaveBeenCalledTimes(2);
    });

    it('as a function that throws when it is called again: destroys the connection within settleTimeout', async () => {
      let made = 0;
      const knex = connect({
        stream: () => {
          if (made++ > 0) throw new Error('no more');
          return throughSocket();
        },
      });
      await isGivenUp(knex);
    });

    it('as a stream of its own, which cannot be had again: destroys the connection within settleTimeout', async () => {
      await isGivenUp(connect({ stream: throughSocket() as never }));
    });
  });

  it("in pg's pipeline mode: cancels it the same way", async () => {
    await isAborted(connect({ pipeline: true } as never));
  });

  it('of a pool of pg (connectionPool): cancels it the same way', async () => {
    const pool = new Pool({ ...to({ ssl: server.ca ? { ca: server.ca } : false } as never), max: 1 });
    const knex = createKnex({ client: 'pg', connectionPool: pool });
    try {
      await isAborted(knex);
      expect(pool.totalCount).toBe(1);
    } finally {
      await pool.end();
    }
  });

  it("of a pool of pg with a `stream` function: cancels by that function's streams", async () => {
    const stream = jest.fn(throughSocket);
    const pool = new Pool({ ...to({ host: 'nowhere.invalid', stream }), max: 1 });
    const knex = createKnex({ client: 'pg', connectionPool: pool });
    try {
      await isAborted(knex);
      expect(stream).toHaveBeenCalledTimes(2);
    } finally {
      await pool.end();
    }
  });
});

function hasIpv6(): boolean {
  return Object.values(networkInterfaces()).some((addresses) => addresses?.some(({ address }) => address === '::1'));
}

/** A way to the server that only the application knows: `host` leads nowhere. */
function throughSocket(): Socket {
  const socket = new Socket();
  const { connect } = socket;
  const { hostname, port } = server.url;
  socket.connect = (() => connect.call(socket, { host: hostname, port: Number(port) } as never)) as never;
  return socket;
}

/** There is no way in for a cancel: the server goes on, but the connection is not used again. */
async function isGivenUp(knex: Knex): Promise<void> {
  const victim = await open(knex, 200);
  await victim.isSleeping();
  await victim.client.reset();
  await eventually(() => expect([victim.hasEnded, used(knex)]).toEqual([true, 0]));
  expect(victim.error).toMatchObject(clientHasGone);
  expect(victim.reasons).toHaveLength(1);
  expect(await victim.backend()).toMatchObject({ state: 'active' });
  await aborts.ledger.database.admin.raw('SELECT pg_terminate_backend(?, 5000)', [victim.pid]);
  expect(await aborts.ledger.stored()).toEqual([]);
}
