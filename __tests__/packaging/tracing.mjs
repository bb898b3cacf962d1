import { ProxyTracerProvider } from '@opentelemetry/api';
import { withSession } from 'express-knex-session';
import { traceSessions } from 'express-knex-session/opentelemetry';
import createKnex from 'knex';

const begun = [];
class Provider extends ProxyTracerProvider {
  getTracer(...of) {
    const tracer = super.getTracer(...of);
    return {
      startActiveSpan: tracer.startActiveSpan.bind(tracer),
      startSpan(name, ...others) {
        begun.push(name);
        return tracer.startSpan(name, ...others);
      },
    };
  }
}

const stop = traceSessions({ tracerProvider: new Provider() });
const knex = createKnex({ client: 'pg', connection: process.env['DATABASE_URL'] });
await withSession(knex, (session) => session('notes'));
stop();
console.log(JSON.stringify(begun.map((name) => name.split(' ')[0])));
await knex.destroy();
