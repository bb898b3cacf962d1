import { trace } from '@opentelemetry/api';
import { type SessionOptions, withSession } from 'express-knex-session';
import { traceSessions } from 'express-knex-session/opentelemetry';
import { get } from './support/http';
import { type Handler, insert, useLedger } from './support/ledger';
import { eventually } from './support/pool';
import { NOT_FAILED, SECRET, serveTraced, useSpans } from './support/spans';

const ledger = useLedger();
const spans = useSpans(() => new URL(ledger.database.url).password);

let stopTracing: () => void;
beforeEach(() => {
  stopTracing = traceSessions();
});
afterEach(() => stopTracing());

const serve = (handler: Handler, options?: SessionOptions) => serveTraced(ledger, spans, handler, options);

describe('when a session has a checkpoint', () => {
  it('makes two spans, one after the other, under the same parent', async () => {
    const http = await serve(async (req, res) => {
      await insert(req, `${SECRET} 1`);
      await req.session.checkpoint();
      await insert(req, `${SECRET} 2`);
      res.sendStatus(409);
    });
    await get(http.url);
    const [first, second] = await spans.transactions(2);
    expect(first.attributes).toMatchObject({ 'express_knex_session.outcome': 'committed', 'express_knex_session.reason': 'checkpoint' });
    expect(second?.attributes).toMatchObject({ 'express_knex_session.outcome': 'rolled back', 'express_knex_session.reason': 'response' });
    expect(second?.attributes['express_knex_session.transaction_id']).toBe(first.attributes['express_knex_session.transaction_id']);
    expect([second?.parent, second?.trace]).toEqual([first.parent, first.trace]);
    expect(await ledger.stored()).toEqual([`${SECRET} 1`]);
  });
});

describe('when no statement is run', () => {
  it('makes no span', async () => {
    const http = await serve((req, res) => {
      req.session.setRollbackOnly();
      res.sendStatus(200);
    });
    await get(http.url);
    await eventually(() => expect(spans.all().map(({ name }) => name)).toEqual(['request']));
  });
});

describe('when withSession() is called', () => {
  const note = (id: string) => withSession(ledger.knex, (session) => session('notes').insert({ id }));

  it('has a trace of its own outside of any span', async () => {
    await note(SECRET);
    const [span] = await spans.transactions();
    expect(span.parent).toBeUndefined();
    expect(span.attributes).toMatchObject({ 'express_knex_session.outcome': 'committed', 'express_knex_session.reason': 'response' });
  });

  it('is in the span of its caller', async () => {
    await trace.getTracer('tests').startActiveSpan('job', async (job) => {
      await note(SECRET);
      job.end();
    });
    const [span] = await spans.transactions();
    expect(span.parent).toBe(spans.all().find(({ name }) => name === 'job')?.id);
  });
});

describe('when requests run at the same time', () => {
  it('has each transaction in the span of its own request', async () => {
    const http = await serve(async (req, res) => {
      const n = Number(req.query['n']);
      for (let i = 0; i < n; i++) await insert(req, `${SECRET} ${n} ${i}`);
      res.sendStatus(n % 2 ? 201 : 404);
    });
    const numbers = Array.from({ length: 12 }, (_, n) => n + 1);
    await Promise.all(numbers.map((n) => get(`${http.url}/?n=${n}`)));
    const found = (await spans.transactions(12)).map(({ parent, attributes }) => ({
      n: Number(spans.all().find(({ id }) => id === parent)?.attributes['n']),
      statements: attributes['express_knex_session.statements'],
      outcome: attributes['express_knex_session.outcome'],
    }));
    expect(found.sort((a, b) => a.n - b.n)).toEqual(
      numbers.map((n) => ({ n, statements: n, outcome: n % 2 ? 'committed' : 'rolled back' })),
    );
  });
});

describe('when a transaction is open for longer than warnAfter', () => {
  it('tells it on its span, without the statement', async () => {
    const http = await serve((req, res) => req.session.raw(`SELECT pg_sleep(0.1), '${SECRET}'`).then(() => res.sendStatus(200)), {
      warnAfter: 10,
      onError: () => {},
    });
    await get(http.url);
    const [span] = await spans.transactions();
    expect(span.events).toEqual(['open', 'long', 'settle']);
    expect(span.whole.events[1]?.attributes).toEqual({
      'express_knex_session.open_ms': expect.any(Number),
      'express_knex_session.statements': 1,
    });
    expect(span.status).toEqual(NOT_FAILED);
  });
});

describe('when a session is used after its end', () => {
  it('tells it on the span that is active there', async () => {
    let code: unknown;
    const http = await serve(async (req, res) => {
      await insert(req, SECRET);
      res.sendStatus(200);
      await eventually(() => expect(req.session.outcome).toBe('committed'));
      await trace.getTracer('tests').startActiveSpan('forgotten', async (span) => {
        code = await insert(req, `${SECRET} 2`).then(undefined, (error) => error.code);
        span.end();
      });
    });
    await get(http.url);
    await eventually(() => expect(code).toBe('ERR_SESSION_CLOSED'));
    const withLate = spans.all().filter(({ events }) => events.includes('late'));
    expect(withLate.map(({ name }) => name)).toEqual(['forgotten']);
    expect(withLate[0]?.whole.events[0]?.attributes).toEqual({ 'error.type': 'ERR_SESSION_CLOSED' });
  });
});
