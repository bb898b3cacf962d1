import { AsyncLocalStorage } from 'node:async_hooks';
import type { Request, RequestHandler } from 'express';
import { type Session, sessionChannels, sessionMiddleware } from 'express-knex-session';
import { openSite } from './support/deadlines';
import { useEvents } from './support/events';
import { get } from './support/http';
import { type Handler, insert, useLedger } from './support/ledger';
import { failOnWarnings } from './support/warnings';

failOnWarnings();
const ledger = useLedger();
const events = useEvents();

describe('the messages of a transaction', () => {
  it('know at each moment what is known then, and are told before the response has left', async () => {
    const atKnex: unknown[] = [];
    const onQuery = ({ __knexTxId }: { __knexTxId: string }) => void atKnex.push(__knexTxId);
    const sent: boolean[] = [];
    const site = await openSite(ledger, async (req, res) => {
      req.session.on('query', onQuery);
      await insert(req, 'secret');
      res.once('finish', () => sent.push(events.order().includes('settled')));
      res.status(201).json('body');
    });
    expect(await site.get()).toMatchObject({ status: 201 });
    const [acquire, open, settle, settled] = events.told.map(({ asTold }) => asTold);
    const unknown = { heldMs: undefined, outcome: undefined, reason: undefined };
    expect(acquire).toMatchObject({ waitedMs: undefined, statements: 0, lastStatement: undefined, decision: undefined, ...unknown });
    expect(open).toMatchObject({ waitedMs: expect.any(Number), statements: 0, decision: undefined, ...unknown });
    expect(settle).toMatchObject({
      statements: 1,
      lastStatement: expect.stringMatching(/^insert into "notes"/),
      decision: 'commit',
      ...unknown,
    });
    expect(settled).toMatchObject({ heldMs: expect.any(Number), outcome: 'committed', reason: 'response', bytesHeld: 6, error: undefined });
    expect(new Set(atKnex)).toEqual(new Set([acquire.id]));
    expect(atKnex).toHaveLength(3);
    expect(sent).toEqual([true]);
  });

  it('are those of their own requests, of 50 at once', async () => {
    const site = await openSite(ledger, async (req, res) => {
      const id = String(req.query['id']);
      await insert(req, id);
      if (Number(id) % 3 === 0) await req.session('notes').where({ id });
      res.status(Number(id) % 2 ? 201 : 409).send(id);
    });
    const ids = Array.from({ length: 50 }, (_, i) => i);
    await Promise.all(ids.map((id) => get(`${site.url}/?id=${id}`)));
    const settled = await events.settled(50);
    const seen = settled.map(({ request, session, statements, outcome, bytesHeld }) => {
      expect(request?.session).toBe(session);
      return [Number(request?.query['id']), statements, outcome, bytesHeld] as const;
    });
    seen.sort(([a], [b]) => a - b);
    expect(seen).toEqual(ids.map((id) => [id, id % 3 ? 1 : 2, id % 2 ? 'committed' : 'rolled back', String(id).length]));
  });

  it('come in the asynchronous context of their request', async () => {
    const context = new AsyncLocalStorage<string>();
    const wrong: unknown[] = [];
    const listen = (name: keyof typeof sessionChannels) => {
      const listener = ({ request }: { request: Request | undefined }) => {
        if (context.getStore() !== request?.path) wrong.push([name, request?.path, context.getStore()]);
      };
      sessionChannels[name].subscribe(listener);
      return () => sessionChannels[name].unsubscribe(listener);
    };
    const ends = (Object.keys(sessionChannels) as (keyof typeof sessionChannels)[]).map(listen);
    const knex = ledger.pool({ pool: { min: 0, max: 2 } });
    const handler: Handler = async (req, res) => {
      await insert(req, req.path);
      if (req.path === '/2') await req.session.raw('SELECT pg_sleep(0.04)');
      if (req.path === '/4') await req.session.raw('SELECT pg_terminate_backend(pg_backend_pid())').catch(() => {});
      await req.session[req.path === '/3' ? 'rollback' : 'commit']().catch(() => {});
      await insert(req, 'late').catch(() => {});
      res.end();
    };
    const site = await openSite(ledger, (req, res, next) => context.run(req.path, handler, req, res, next), { knex, warnAfter: 20 });
    await Promise.all(Array.from({ length: 10 }, (_, i) => get(`${site.url}/${i}`)));
    await events.settled(10);
    expect(new Set(events.order())).toEqual(new Set(Object.keys(sessionChannels)));
    expect(wrong).toEqual([]);
    for (const end of ends) end();
  });

  it("say of the second of two sessions that it was rolled back by the first one's error", async () => {
    const site = await openSite(ledger, {
      routes(app) {
        app.use(sessionMiddleware(ledger.knex, { property: 'db' as never }));
        app.get('/', (async (req, res) => {
          await insert(req, 'a', 'fail');
          await (req as unknown as { db: Session }).db('notes').insert({ id: 'b', at_commit: 'fail' });
          res.sendStatus(201);
        }) as RequestHandler);
      },
    });
    expect(await site.get()).toMatchObject({ status: 500 });
    const settled = await events.settled(2);
    expect(settled.map(({ outcome, reason }) => [outcome, reason])).toEqual(Array(2).fill(['rolled back', 'error']));
    expect(settled[0]?.error).toMatchObject({ code: '23514' });
    expect(settled[1]?.error).toBe(settled[0]?.error);
  });
});
