import type { TracerProvider } from '@opentelemetry/api';
import { traceSessions } from 'express-knex-session/opentelemetry';

const provider: TracerProvider | undefined = undefined;
const stop: () => void = traceSessions({ tracerProvider: provider });
stop();
console.log(JSON.stringify(['transaction']));
