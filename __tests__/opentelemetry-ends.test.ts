import { SpanKind } from '@opentelemetry/api';
import type { Request } from 'express';
import type { Session, SessionOptions } from 'express-knex-session';
import { traceSessions } from 'express-knex-session/opentelemetry';
import { get, RawClient } from './support/http';
import { express5Flavour, type Handler, insert, useLedger } from './support/ledger';
import { eventually } from './support/pool';
import { FAILED, NOT_FAILED, SECRET, serveTraced, useSpans } from './support/spans';

const ledger = useLedger();
const spans = useSpans(() => new URL(ledger.database.url).password);

let stopTracing: () => void;
beforeEach(() => {
  stopTracing = traceSessions();
});
afterEach(() => stopTracing());

const serve = (handler: Handler, options?: SessionOptions) => serveTraced(ledger, spans, handler, options);
const sendStatus =
  (status: number): Handler =>
  (_req, res) =>
    void res.sendStatus(status);
const slow = async (req: Request) => void (await req.session.raw(`SELECT pg_sleep(10), '${SECRET}'`));

const answerIgnoring =
  (status: number): Handler =>
  (req, res) =>
    insert(req, SECRET)
      .catch(() => {})
      .then(() => res.sendStatus(status));

class Broken extends Error {}
const broken = (properties?: object) => Object.assign(new Broken(SECRET), properties);

interface Case {
  name: string;
  /** After a note was inserted. */
  end: Handler;
  atCommit?: 'fail' | 'die';
  options?: SessionOptions;
  outcome: string;
  reason: string;
  /** Its status is ERROR then. */
  errorType?: string;
  sqlState?: string;
  events?: string[];
}

const cases: Case[] = [
  { name: 'a 201', end: sendStatus(201), outcome: 'committed', reason: 'response' },
  { name: 'a 409', end: sendStatus(409), outcome: 'rolled back', reason: 'response' },
  {
    name: 'setRollbackOnly(error)',
    end: (req, res) => {
      req.session.setRollbackOnly(broken());
      res.sendStatus(200);
    },
    outcome: 'rolled back',
    reason: 'rollback only',
  },
  {
    name: 'rollback(error)',
    end: async (req, res) => {
      await req.session.rollback(broken());
      res.sendStatus(200);
    },
    outcome: 'rolled back',
    reason: 'rollback',
  },
  {
    name: 'an error that stands for a 404',
    end: () => Promise.reject(broken({ status: 404 })),
    outcome: 'rolled back',
    reason: 'error',
  },
  {
    name: 'an error',
    end: () => Promise.reject(broken()),
    outcome: 'rolled back',
    reason: 'error',
    errorType: 'Broken',
  },
  {
    name: 'an error whose code is a text',
    end: () => Promise.reject(broken({ code: `${SECRET} ${SECRET}`, status: 502 })),
    outcome: 'rolled back',
    reason: 'error',
    errorType: 'Broken',
  },
  { name: 'a thrown string', end: () => Promise.reject(SECRET), outcome: 'rolled back', reason: 'error', errorType: '_OTHER' },
  {
    name: 'an error of the server, passed on',
    end: async (req) => void (await insert(req, SECRET)),
    outcome: 'rolled back',
    reason: 'error',
    errorType: '23505',
    sqlState: '23505',
  },
  {
    name: 'an error of the server, answered with a 409',
    end: answerIgnoring(409),
    outcome: 'rolled back',
    reason: 'response',
  },
  {
    name: 'an error of the server, swallowed',
    end: answerIgnoring(200),
    outcome: 'rolled back',
    reason: 'error',
    errorType: 'ERR_TRANSACTION_ABORTED',
    sqlState: '23505',
  },
  {
    name: 'a COMMIT that a deferred constraint refuses',
    end: sendStatus(201),
    atCommit: 'fail',
    outcome: 'rolled back',
    reason: 'error',
    errorType: '23514',
    sqlState: '23514',
  },
  {
    name: 'a COMMIT whose connection is lost',
    end: sendStatus(201),
    atCommit: 'die',
    outcome: 'unknown',
    reason: 'error',
    errorType: 'ERR_COMMIT_UNKNOWN',
    sqlState: '57P01',
    events: ['open', 'settle', 'destroyed'],
  },
  {
    name: 'transactionTimeout',
    end: (req) => slow(req),
    options: { transactionTimeout: 30 },
    outcome: 'rolled back',
    reason: 'timeout',
    errorType: 'ERR_SESSION_TIMEOUT',
    sqlState: '57014',
  },
];

describe('when a transaction is ended by', () => {
  it.each(cases)('$name: $outcome, $reason', async ({ end, atCommit, options, outcome, reason, errorType, sqlState, events }) => {
    let statements = 0;
    const http = await serve(async (req, res, next) => {
      req.session.on('query', ({ sql }) => {
        if (!/^(BEGIN|COMMIT|ROLLBACK)/.test(sql)) statements++;
      });
      await insert(req, SECRET, atCommit);
      return end(req, res, next);
    }, options);
    await get(http.url);

    const [span] = await spans.transactions();
    const { hostname, port, pathname } = new URL(ledger.database.url);
    const database = pathname.slice(1);
    expect(span).toMatchObject({
      name: `transaction ${database}`,
      kind: SpanKind.INTERNAL,
      status: errorType === undefined ? NOT_FAILED : FAILED,
      events: events ?? ['open', 'settle'],
    });
    expect(span.attributes).toEqual({
      'db.system.name': 'postgresql',
      'db.operation.name': 'transaction',
      'db.namespace': database,
      'server.address': hostname,
      'server.port': Number(port),
      'express_knex_session.transaction_id': expect.stringMatching(/^session\d+$/),
      'express_knex_session.outcome': outcome,
      'express_knex_session.reason': reason,
      'express_knex_session.statements': statements,
      'express_knex_session.waited_ms': expect.any(Number),
      'express_knex_session.held_ms': expect.any(Number),
      'express_knex_session.bytes_held': expect.any(Number),
      ...(errorType && { 'error.type': errorType }),
      ...(sqlState && { 'db.response.status_code': sqlState }),
    });
    const parent = spans.all().find(({ name }) => name === 'request');
    expect([span.trace, span.parent]).toEqual([parent?.trace, parent?.id]);
  });
});

describe('when the client has gone', () => {
  it('is no error of the server', async () => {
    let session: Session | undefined;
    const http = await serve(async (req) => {
      session = req.session;
      await insert(req, SECRET);
      await slow(req);
    });
    const client = (await RawClient.connect(http.port)).get('/');
    await eventually(() => expect(session?.outcome).toBe('open'));
    await client.reset();
    const [span] = await spans.transactions();
    expect(span.status).toEqual(NOT_FAILED);
    expect(span.attributes).toMatchObject({ 'express_knex_session.outcome': 'rolled back', 'express_knex_session.reason': 'disconnect' });
    expect(span.attributes).not.toHaveProperty(['error.type']);
  });
});

describe('when no connection is to be had', () => {
  const passOn: Handler = async (req) => void (await insert(req, SECRET));
  it.each([
    { name: 'the error is passed on', handle: passOn, errorType: 'ERR_SESSION_UNAVAILABLE' },
    { name: 'the handler answers by itself', handle: answerIgnoring(503), errorType: '_OTHER' },
  ])('has failed without an open, where $name', async ({ handle, errorType }) => {
    const knex = ledger.pool({ pool: { min: 0, max: 1 } });
    const holder = await knex.transaction();
    const http = await ledger.serving(express5Flavour)(handle, { knex, acquireTimeout: 20 });
    expect(await get(http.url)).toMatchObject({ status: 503 });
    await holder.rollback();
    const [span] = await spans.transactions();
    expect(span).toMatchObject({ status: FAILED, events: [] });
    expect(span.attributes).toMatchObject({ 'express_knex_session.outcome': 'unused', 'error.type': errorType });
    expect(span.attributes['express_knex_session.waited_ms']).toBeGreaterThanOrEqual(15);
    expect(span.attributes).not.toHaveProperty(['express_knex_session.held_ms']);
  });
});
