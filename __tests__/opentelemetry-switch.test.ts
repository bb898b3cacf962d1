import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { diag, trace } from '@opentelemetry/api';
import { AlwaysOffSampler, InMemorySpanExporter, NodeTracerProvider, SimpleSpanProcessor } from '@opentelemetry/sdk-trace-node';
import { sessionChannels, withSession } from 'express-knex-session';
import { type TraceSessionsOptions, traceSessions } from 'express-knex-session/opentelemetry';
import type { Knex } from 'knex';
import { useLedger } from './support/ledger';
import { NOT_FAILED, SECRET, useSpans } from './support/spans';
import { root } from './support/typescript';

const ledger = useLedger();
const passwordOf = () => new URL(ledger.database.url).password;
const spans = useSpans(passwordOf);

const note = (id: string, knex = ledger.knex) => withSession(knex, (session) => session('notes').insert({ id: `${SECRET} ${id}` }));
const isWatched = () => Object.values(sessionChannels).some(({ hasSubscribers }) => hasSubscribers);

afterEach(() => expect(isWatched()).toBe(false));

describe('traceSessions()', () => {
  it('makes no span before it is called, nor after it was stopped', async () => {
    await note('before');
    const stop = traceSessions();
    await note('meanwhile');
    stop();
    await note('after');
    expect(await spans.transactions()).toHaveLength(1);
  });

  it('can be stopped twice, and begun again', async () => {
    const first = traceSessions();
    first();
    const second = traceSessions();
    first();
    expect(traceSessions()).toBe(second);
    await note('a');
    second();
    expect(await spans.transactions()).toHaveLength(1);
  });

  it('makes one span where it is called twice', async () => {
    const stop = traceSessions();
    expect(traceSessions({})).toBe(stop);
    await note('a');
    stop();
    expect(await spans.transactions()).toHaveLength(1);
  });

  it('ends the spans of transactions that are open when it is stopped, and then listens no more', async () => {
    const stop = traceSessions();
    await withSession(ledger.knex, async (session) => {
      await session('notes').insert({ id: SECRET });
      stop();
      await note('after');
      expect(isWatched()).toBe(true);
    });
    expect(isWatched()).toBe(false);
    const [span] = await spans.transactions();
    expect(span).toMatchObject({ attributes: { 'express_knex_session.outcome': 'committed' }, events: ['open', 'settle'] });
  });

  it('uses the given provider', async () => {
    const exporter = new InMemorySpanExporter();
    const tracerProvider = new NodeTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] });
    const stop = traceSessions({ tracerProvider });
    await note('a');
    stop();
    expect(exporter.getFinishedSpans().map(({ name }) => name)).toEqual([expect.stringMatching(/^transaction test_/)]);
    expect(spans.all()).toEqual([]);
    await tracerProvider.shutdown();
  });

  it('tells who makes the spans', async () => {
    const stop = traceSessions();
    await note('a');
    stop();
    const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
    const [span] = await spans.transactions();
    expect(span.whole.instrumentationScope).toMatchObject({ name: 'express-knex-session', version });
  });

  it('leaves alone what is not sampled', async () => {
    const stop = traceSessions({ tracerProvider: new NodeTracerProvider({ sampler: new AlwaysOffSampler() }) });
    await note('a');
    stop();
    expect(await ledger.stored()).toEqual([`${SECRET} a`]);
  });

  it.each([
    [null, 'Expected options to be an object such as { tracerProvider }, got null.'],
    [{ provider: trace }, 'Unknown option `provider`. traceSessions() takes: tracerProvider.'],
    [{ tracerProvider: {} }, 'Expected `tracerProvider` to have a method getTracer(), got Object.'],
    [{ tracerProvider: null }, 'Expected `tracerProvider` to have a method getTracer(), got null.'],
  ])('refuses %p', (options, message) => {
    expect(() => traceSessions(options as TraceSessionsOptions)).toThrow(new TypeError(message));
  });
});

describe('when making a span fails', () => {
  it.each([
    {
      name: 'a provider that throws',
      options: {
        tracerProvider: {
          getTracer: () => {
            throw new Error(SECRET);
          },
        },
      },
      count: 0,
    },
    {
      name: 'an error that cannot be read',
      error: Object.defineProperty(new Error(SECRET), 'code', {
        get: () => {
          throw new Error(SECRET);
        },
      }),
      count: 1,
    },
  ])('tells OpenTelemetry, and not the process or the session: $name', async ({ options, error, count }) => {
    const told: unknown[] = [];
    const ignore = () => {};
    diag.setLogger({ error: (message) => told.push(message), warn: ignore, info: ignore, debug: ignore, verbose: ignore });
    const stop = traceSessions(options);
    const work = withSession(ledger.knex, async (session) => {
      await session('notes').insert({ id: SECRET });
      if (error) throw error;
    });
    if (error) await expect(work).rejects.toBe(error);
    else await work;
    stop();
    diag.disable();
    expect(told).toEqual(['express-knex-session/opentelemetry has failed']);
    expect(await ledger.stored()).toHaveLength(error ? 0 : 1);
    await spans.transactions(count);
  });
});

describe('the server of a span', () => {
  const parts = () => {
    const { hostname, port, pathname, username } = new URL(ledger.database.url);
    return { host: hostname, port: Number(port), database: pathname.slice(1), user: username, password: passwordOf() };
  };
  const configurations: [string, () => NonNullable<Knex.Config['connection']>][] = [
    ['an URL', () => ledger.database.url],
    ['fields', parts],
    ['an URL in a field', () => ({ connectionString: ledger.database.url })],
    ['a function', () => async () => parts()],
    ['the environment', () => ({ user: parts().user, password: passwordOf(), application_name: 'tests' })],
  ];

  it.each(configurations)('is known from %s', async (name, connection) => {
    const { host, port, database } = parts();
    const before = { ...process.env };
    if (name === 'the environment') Object.assign(process.env, { PGHOST: host, PGPORT: String(port), PGDATABASE: database });
    const knex = ledger.pool({ connection: connection() });
    const stop = traceSessions();
    await note('a', knex);
    await note('b', knex);
    stop();
    for (const variable of ['PGHOST', 'PGPORT', 'PGDATABASE']) {
      if (before[variable] === undefined) delete process.env[variable];
      else process.env[variable] = before[variable];
    }
    for (const span of await spans.transactions(2)) {
      expect(span).toMatchObject({
        name: `transaction ${database}`,
        status: NOT_FAILED,
        attributes: { 'db.namespace': database, 'server.address': host, 'server.port': port },
      });
    }
  });

  it('is left out where the parts of what Knex was given are not known: one is the password', async () => {
    const knex = ledger.pool({ connection: { connectionString: `postgres://postgres:${passwordOf()}@[` } });
    const stop = traceSessions();
    await expect(note('a', knex)).rejects.toMatchObject({ code: 'ERR_SESSION_UNAVAILABLE' });
    stop();
    const [span] = await spans.transactions();
    expect(span.name).toBe('transaction');
    expect(span.attributes).toEqual(expect.not.objectContaining({ 'server.address': expect.anything() }));
    expect(span.attributes).not.toHaveProperty(['db.namespace']);
  });
});
