/* For pgbouncer.ts: starts a PgBouncer, tells about it, and stops it when stdin closes. Jest's sandbox loads no ES modules. */
import { once } from 'node:events';
import { startPgBouncer } from '../../tools/pgbouncer.mjs';

const pooler = await startPgBouncer({ ...JSON.parse(process.argv[2] ?? '{}'), log: (line) => console.error(line) });
console.log(JSON.stringify(pooler));
process.stdin.resume();
await once(process.stdin, 'close');
await pooler.stop();
