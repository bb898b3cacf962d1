import { type Attributes, context, type SpanStatus, SpanStatusCode, type TracerProvider, trace } from '@opentelemetry/api';
import { InMemorySpanExporter, NodeTracerProvider, type ReadableSpan, SimpleSpanProcessor } from '@opentelemetry/sdk-trace-node';
import type { Express, RequestHandler } from 'express';
import type { SessionOptions } from 'express-knex-session';
import { express5Flavour, type Handler, type Ledger, type Served } from './ledger';
import { eventually } from './pool';

/** What the tests' values have in them: no span may. */
export const SECRET = 'hush';

export interface ExportedSpan {
  name: string;
  kind: number;
  id: string;
  parent: string | undefined;
  trace: string;
  attributes: Attributes;
  status: SpanStatus;
  /** Names, without ours before them. */
  events: string[];
  whole: ReadableSpan;
}

export interface Spans {
  readonly provider: TracerProvider;
  /** A span for each request, with its query as attributes: what the instrumentations of HTTP do. */
  readonly aroundRequest: RequestHandler;
  all(): ExportedSpan[];
  /** Those of transactions, once there are that many. */
  transactions(count?: number): Promise<[ExportedSpan, ...ExportedSpan[]]>;
}

/** The SDK around all tests of a file. After each test: every span has ended, and none holds a value. */
export function useSpans(passwordOf: () => string): Spans {
  const exporter = new InMemorySpanExporter();
  const open = new Set<unknown>();
  const noteOpen = {
    onStart: (span: unknown) => void open.add(span),
    onEnd: (span: unknown) => void open.delete(span),
    forceFlush: async () => {},
    shutdown: async () => {},
  };
  const provider = new NodeTracerProvider({ spanProcessors: [noteOpen, new SimpleSpanProcessor(exporter)] });
  beforeAll(() => provider.register());
  afterAll(() => provider.shutdown());
  afterEach(async () => {
    await eventually(() => expect(open.size).toBe(0)).finally(() => open.clear());
    const text = JSON.stringify(exporter.getFinishedSpans().map(plain));
    exporter.reset();
    expect(text).not.toContain(SECRET);
    expect(text).not.toContain(passwordOf());
    expect(text).not.toMatch(/insert into|select /i);
  });

  const all = (): ExportedSpan[] => exporter.getFinishedSpans().map(exported);
  return {
    provider,
    all,
    aroundRequest(req, res, next) {
      const span = provider.getTracer('tests').startSpan('request', { attributes: req.query as Attributes });
      res.once('close', () => span.end());
      context.with(trace.setSpan(context.active(), span), next);
    },
    transactions: (count = 1) =>
      eventually(() => {
        const found = all().filter(({ whole }) => whole.instrumentationScope.name === 'express-knex-session');
        expect(found).toHaveLength(count);
        return found as [ExportedSpan, ...ExportedSpan[]];
      }),
  };
}

/** An app that answers every request with this handler, in a span of the request. */
export function serveTraced(ledger: Ledger, { aroundRequest }: Spans, handler: Handler, options?: SessionOptions): Promise<Served> {
  const routes = (app: Express): void => {
    app.use(aroundRequest);
    app.use(handler);
  };
  return ledger.serve(express5Flavour, routes, options);
}

export const NOT_FAILED: SpanStatus = { code: SpanStatusCode.UNSET };
export const FAILED: SpanStatus = { code: SpanStatusCode.ERROR };

function exported(span: ReadableSpan): ExportedSpan {
  return {
    name: span.name,
    kind: span.kind,
    id: span.spanContext().spanId,
    parent: span.parentSpanContext?.spanId,
    trace: span.spanContext().traceId,
    attributes: span.attributes,
    status: span.status,
    events: span.events.map(({ name }) => name.replace('express_knex_session.', '')),
    whole: span,
  };
}

/** All that an exporter may send. */
function plain({ name, attributes, events, links, status, resource, instrumentationScope }: ReadableSpan): object {
  return { name, attributes, events, links, status, resource: resource.attributes, instrumentationScope };
}
