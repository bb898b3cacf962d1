import express from 'express';
import { scopedSession, sessionMiddleware } from 'express-knex-session';
import { get, listen } from './support/http';
import { failOnWarnings } from './support/warnings';
import { useBench } from './support/wire';
import type { WireMessage } from './support/wire-proxy';

failOnWarnings();
const bench = useBench({ pool: { min: 0, max: 3 } });

describe('when 10,000 statements of interleaved requests share three connections', () => {
  /** `TRACE_REQUESTS=10000` takes 40 s. */
  const REQUESTS = Number(process.env['TRACE_REQUESTS'] || 400);
  /** Of each request: 8 plain ones, 7 that come later, 8 in a savepoint, a stream, and one in its listener. */
  const STATEMENTS = 25;

  it('runs none of them on a connection that another request holds: a trace of the wire', async () => {
    const db = scopedSession(bench.knex);
    const say = (name: number, how: string) => db.raw(`/* of ${name} */ select 1 as ${how}`);
    /** Services that know the name of the request, and no session. */
    const plain = (name: number) => say(name, 'plain');
    const later = (name: number) => new Promise((done, fail) => setImmediate(() => say(name, 'later').then(done, fail)));
    const savepoint = (name: number) =>
      db.transaction(async (trx) => {
        for (let i = 0; i < 8; i++) await trx.raw(`/* of ${name} */ select 1 as savepoint`);
      });
    const stream = (name: number) =>
      new Promise((done, fail) =>
        db
          .raw(`/* of ${name} */ select 1 as streamed`)
          .stream()
          .on('data', () => {})
          .on('error', fail)
          .on('end', () => say(name, 'of_a_listener').then(done, fail)),
      );
    const app = express()
      .use(sessionMiddleware(bench.knex, { context: true, acquireTimeout: 30_000 }))
      .get('/:name', async (req, res) => {
        const name = Number(req.params.name);
        await Promise.all([plain(name), stream(name)]);
        await savepoint(name);
        for (let round = 0; round < 7; round++) await Promise.all([plain(name), later(name)]);
        res.status(name % 7 === 0 ? 400 : 200).end();
      });
    const server = await listen(app);
    const names = Array.from({ length: REQUESTS }, (_, i) => i);
    const answers: number[] = [];
    const next = names.values();
    const client = async () => {
      for (const name of next) answers.push((await get(`${server.url}/${name}`)).status);
    };
    await Promise.all(Array.from({ length: 20 }, client));
    await server.close();

    expect(answers.filter((status) => status >= 500)).toEqual([]);
    expect(traceOf(bench.proxy.frontend)).toEqual({
      connections: 3,
      statements: REQUESTS * STATEMENTS,
      foreign: [],
      transactions: REQUESTS,
    });
    // 4 s on an idle machine.
  }, 60_000);

  /** Follows each connection, from BEGIN to its end: whose transaction it is, and whose statements run in it. */
  function traceOf(messages: readonly WireMessage[]) {
    const owners = new Map<number, number | undefined>();
    const foreign: string[] = [];
    let [statements, transactions] = [0, 0];
    for (const { connection, type, text } of messages) {
      if (type !== 'P' && type !== 'Q') continue;
      const named = /^\/\* of (\d+) \*\//.exec(text);
      if (/^BEGIN/.test(text)) owners.set(connection, -1);
      else if (/^(COMMIT|ROLLBACK$)/.test(text)) owners.set(connection, undefined);
      else if (named) {
        statements++;
        const name = Number(named[1]);
        if (owners.get(connection) === -1) {
          owners.set(connection, name);
          transactions++;
        } else if (owners.get(connection) !== name) foreign.push(text);
      }
    }
    return { connections: owners.size, statements, foreign, transactions };
  }
});
