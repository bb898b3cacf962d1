import { EventEmitter } from 'node:events';
import { setTimeout as delay } from 'node:timers/promises';
import { runInThisContext } from 'node:vm';
import { type Session, type SessionOpenLongError, scopedSession, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import { Model } from 'objection';
import { openSite } from './support/deadlines';
import { useEvents } from './support/events';
import { get } from './support/http';
import { type Handler, insert, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();
const events = useEvents();

const linger = (ms = 60) => delay(ms);

/** The line of this file on which a marked statement is. */
function lineOf(error: SessionOpenLongError): string | undefined {
  return /events-first-use\.test\.ts:(\d+):\d+/.exec(error.stack ?? '')?.[1];
}

/** A line of this file, as it is called in a stack. */
const here = (): number =>
  Number(/events-first-use\.test\.ts:(\d+):\d+/.exec((new Error().stack ?? '').split('\n').slice(2).join('\n'))?.[1]);

describe('where the session was first used', () => {
  const inHelper = (session: Session) => {
    const builder = session('notes').count();
    return [here() - 1, builder] as [number, PromiseLike<unknown>];
  };
  /** Each says on which line it has used the session. */
  const ways: [string, (session: Session) => [number, PromiseLike<unknown>]][] = [
    ["session('notes')", (session) => [here(), session('notes')]],
    ['session.raw()', (session) => [here(), session.raw('SELECT 1')]],
    ['session.select()', (session) => [here(), session.select('id').from('notes')]],
    ['session.schema', (session) => [here(), session.schema.hasTable('notes')]],
    ['session.transaction()', (session) => [here(), session.transaction((trx) => trx('notes'))]],
    ['session.savepoint()', (session) => [here(), session.savepoint((trx) => trx('notes'))]],
    ['a stream', (session) => [here(), session('notes').stream().toArray()]],
    ['a helper function', inHelper],
    [
      'a builder that runs later',
      (session) => {
        const [line, builder] = [here(), session('notes')];
        return [line, linger(1).then(() => builder.where({ id: 'a' }))];
      },
    ],
  ];

  it.each(ways)('is on its stack: %s', async (_, use) => {
    let line!: number;
    const site = await openSite(
      ledger,
      async (req, res) => {
        const [usedOn, work] = use(req.session);
        line = usedOn;
        await work;
        await linger(40);
        res.end();
      },
      { warnAfter: 20 },
    );
    await site.get();
    expect(site.reported).toHaveLength(1);
    const [error] = site.reported;
    expect(lineOf(error)).toBe(String(line));
    expect(error.stack).not.toMatch(/[\\/]lib[\\/]|node_modules|\bnode:/);
  });

  it('is the helper, and who has called it', async () => {
    let lines: number[] = [];
    const handler: Handler = async (req, res) => {
      const [line, work] = inHelper(req.session);
      lines = [line, here() - 1];
      await work;
      await linger(40);
      res.end();
    };
    const site = await openSite(ledger, handler, { warnAfter: 20 });
    await site.get();
    const inThisFile = [...site.reported[0].stack.matchAll(/events-first-use\.test\.ts:(\d+):/g)].map(([, line]) => Number(line));
    expect(inThisFile).toEqual(lines);
  });

  it('may be in a function without a name', async () => {
    // As the file is run, without a source map.
    const source = '(emitter, session) => { emitter.once("go", function () {\nsession("notes").then(() => {}); }); emitter.emit("go"); }';
    const use = runInThisContext(source, { filename: '/app/worker.js' });
    const site = await openSite(
      ledger,
      async (req, res) => {
        use(new EventEmitter(), req.session);
        await linger(40);
        res.end();
      },
      { warnAfter: 20 },
    );
    await site.get();
    expect(site.reported[0].stack).toMatch(/at EventEmitter\.<anonymous> \(\/app\/worker\.js:2:1\)/);
  });

  it('is in withSession(), too', async () => {
    const reported: any[] = [];
    let line!: number;
    const job = async (session: Session) => {
      line = here();
      await session('notes');
      await linger(40);
    };
    await withSession(ledger.knex, job, { warnAfter: 20, onError: (error) => reported.push(error) });
    expect(reported).toHaveLength(1);
    expect(reported[0]).toMatchObject({
      code: 'ERR_SESSION_OPEN_LONG',
      route: undefined,
      message: expect.stringMatching(/^withSession\(\) has had/),
    });
    expect(lineOf(reported[0])).toBe(String(line + 1));
    expect(events.long().map(({ error, request }) => [error, request])).toEqual([[reported[0], undefined]]);
  });

  it('is in a hook, too', async () => {
    let line!: number;
    const site = await openSite(
      ledger,
      async (req, res) => {
        await insert(req, 'a');
        req.session.afterCommit(async (session) => {
          line = here();
          await session('notes');
          await linger(40);
        });
        res.end();
      },
      { warnAfter: 20 },
    );
    await get(`${site.url}/path`);
    // On a busy machine that of the request may be told of, too.
    expect(site.reported.at(-1)).toMatchObject({ route: 'GET /path', statement: 'select * from "notes"' });
    expect(lineOf(site.reported.at(-1))).toBe(String(line + 1));
  });

  it('is with a model of Objection, too', async () => {
    class Note extends Model {
      static override readonly tableName = 'notes';
    }
    let line!: number;
    const handler: Handler = async (req, res) => {
      await Note.query(req.session);
      line = here() - 1;
      await linger(40);
      res.end();
    };
    const site = await openSite(ledger, handler, { warnAfter: 20 });
    await site.get();
    expect(lineOf(site.reported[0])).toBe(String(line));
  });

  it.each<[string, (knex: Knex, session: Session) => PromiseLike<unknown>]>([
    ['.transacting()', (knex, session) => knex('notes').transacting(session)],
    ['a scopedSession()', (knex) => scopedSession(knex)('notes')],
  ])('is not known with %s, whose builders are made without the session: all else is told', async (_, use) => {
    const handler: Handler = async (req, res) => {
      await use(ledger.knex, req.session);
      await linger(40);
      res.end();
    };
    const site = await openSite(ledger, handler, { warnAfter: 20, context: true });
    await site.get();
    expect(site.reported).toMatchObject([{ route: 'GET /', statement: 'select * from "notes"' }]);
    expect(site.reported[0].stack).toMatch(/\n {4}Last statement: select \* from "notes"$/);
  });

  it('is noted only where the option is on, and once', async () => {
    const makers: string[][] = [];
    const ownMakers = (session: Session) => {
      const { client } = (session as unknown as { context: { client: Record<string, unknown> } }).context;
      return Object.keys(client).filter((name) => typeof client[name] === 'function');
    };
    const handler: Handler = async (req, res) => {
      makers.push(ownMakers(req.session));
      await insert(req, String(makers.length));
      makers.push(ownMakers(req.session));
      res.end();
    };
    for (const options of [{}, { warnAfter: 0 }, { warnAfter: 1_000 }]) await (await openSite(ledger, handler, options)).get();
    expect(makers).toEqual([[], [], [], [], ['queryBuilder', 'raw', 'schemaBuilder', 'transaction'], []]);
  });
});
