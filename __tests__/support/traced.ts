import { SpanStatusCode } from '@opentelemetry/api';
import { registerInstrumentations } from '@opentelemetry/instrumentation';
import { ExpressInstrumentation } from '@opentelemetry/instrumentation-express';
import { HttpInstrumentation } from '@opentelemetry/instrumentation-http';
import { KnexInstrumentation } from '@opentelemetry/instrumentation-knex';
import { PgInstrumentation, type PgInstrumentationConfig } from '@opentelemetry/instrumentation-pg';
import { InMemorySpanExporter, NodeTracerProvider, type ReadableSpan, SimpleSpanProcessor } from '@opentelemetry/sdk-trace-node';
import type { Stage } from './traced-app';

/*
 * A program with the real instrumentations around the app of traced-app.ts: they patch modules as these are required, which Jest does in
 * its own way. It is given stages, and prints a `TracedRun` of each.
 */

export interface TracedStage extends Stage {
  pgInstrumentation: PgInstrumentationConfig;
}

export interface TracedRun {
  /** Statuses of the responses. */
  answers: number[];
  spans: TracedSpan[];
}

export interface TracedSpan extends Pick<ReadableSpan, 'name' | 'kind' | 'attributes'> {
  /** What has made it: 'http', 'express', 'knex', 'pg', or this package. */
  by: string;
  id: string;
  parent?: string;
  trace: string;
  from: number;
  until: number;
  hasFailed: boolean;
}

function tracedSpan(span: ReadableSpan): TracedSpan {
  const { name, kind, attributes, parentSpanContext } = span;
  const { spanId, traceId } = span.spanContext();
  return {
    name,
    kind,
    attributes,
    by: span.instrumentationScope.name.replace('@opentelemetry/instrumentation-', ''),
    id: spanId,
    ...(parentSpanContext && { parent: parentSpanContext.spanId }),
    trace: traceId,
    from: inMs(span.startTime),
    until: inMs(span.endTime),
    hasFailed: span.status.code === SpanStatusCode.ERROR,
  };
}

const inMs = ([seconds, nanoseconds]: ReadableSpan['startTime']) => seconds * 1e3 + nanoseconds / 1e6;

async function run(stages: TracedStage[]): Promise<void> {
  const exporter = new InMemorySpanExporter();
  const pg = new PgInstrumentation();
  new NodeTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] }).register();
  registerInstrumentations({
    instrumentations: [
      new HttpInstrumentation({ disableOutgoingRequestInstrumentation: true }),
      new ExpressInstrumentation(),
      pg,
      new KnexInstrumentation(),
    ],
  });
  // Not before.
  const { serve }: typeof import('./traced-app') = require('./traced-app');
  const runs: TracedRun[] = [];
  for (const { pgInstrumentation, ...stage } of stages) {
    pg.setConfig(pgInstrumentation);
    const answers = await serve(stage);
    runs.push({ answers, spans: exporter.getFinishedSpans().map(tracedSpan) });
    exporter.reset();
  }
  process.stdout.write(JSON.stringify(runs));
}

void run(JSON.parse(process.argv[2] as string));
