import { AsyncLocalStorage } from 'node:async_hooks';
import { type Session, withSession } from 'express-knex-session';
import { failOnWarnings } from './support/warnings';
import { deferred, type Handler, useBench } from './support/wire';

failOnWarnings();

const insert = (session: Session, name: string) => session('items').insert({ name });

// One connection for all: it was opened in the context of another request, where the driver's events still run (hazard 20).
describe('when an app keeps its own context in AsyncLocalStorage', () => {
  const bench = useBench({ pool: { min: 0, max: 1 } });
  const requests = new AsyncLocalStorage<string>();
  /** Runs two requests at once, each with a context of its own, and gives what each of them saw. */
  async function twice(handler: (name: string, see: () => void, ...args: Parameters<Handler>) => unknown): Promise<string[][]> {
    return Promise.all(
      ['one', 'two'].map(async (name) => {
        const seen: (string | undefined)[] = [];
        const see = () => seen.push(requests.getStore());
        await bench.answer((req, res, next) => requests.run(name, () => handler(name, see, req, res, next)));
        return seen as string[];
      }),
    );
  }

  it('is back after each statement, savepoint and row', async () => {
    const seen = await twice(async (name, see, req, res) => {
      await insert(req.session, name);
      see();
      await req.session.transaction(async (trx) => {
        see();
        await insert(trx as Session, `${name} inside`);
        see();
      });
      see();
      for await (const _ of req.session('items').limit(1).stream()) see();
      see();
      await Promise.all([req.session.select(1).then(see), req.session.select(2).then(see)]);
      await req.session.commit();
      see();
      res.end();
    });
    expect(seen).toEqual([Array(9).fill('one'), Array(9).fill('two')]);
  });

  it("is there for the response's listeners after COMMIT", async () => {
    const [finishedInOne, finishedInTwo] = [deferred<unknown>(), deferred<unknown>()];
    await twice(async (name, _see, req, res) => {
      await insert(req.session, name);
      res.end(() => (name === 'one' ? finishedInOne : finishedInTwo).resolve(requests.getStore()));
    });
    expect([await finishedInOne.promise, await finishedInTwo.promise]).toEqual(['one', 'two']);
  });

  it('is there for listeners on a builder and on the session', async () => {
    const seen = await twice(async (name, see, req, res) => {
      req.session.on('query', see);
      await insert(req.session, name).on('query', see);
      res.end();
    });
    for (const [i, name] of ['one', 'two'].entries()) expect(new Set(seen[i])).toEqual(new Set([name]));
  });

  it('is back when withSession() has committed, and when it has failed', async () => {
    const seen = await Promise.all(
      ['one', 'two'].map((name) =>
        requests.run(name, async () => {
          await withSession(bench.knex, (session) => insert(session, name).then(() => {}));
          const first = requests.getStore();
          await withSession(bench.knex, (session) => insert(session, name).then(() => {})).catch(() => {});
          return [first, requests.getStore()];
        }),
      ),
    );
    expect(seen).toEqual([
      ['one', 'one'],
      ['two', 'two'],
    ]);
  });

  it('is there for the error handlers when COMMIT fails', async () => {
    await bench.database.admin('items').insert([{ name: 'one' }, { name: 'two' }]);
    const stores: unknown[] = [];
    bench.onErrorHandler = () => stores.push(requests.getStore());
    await twice(async (name, _see, req, res) => {
      await insert(req.session, name);
      res.end();
    });
    expect(bench.errors.map(({ code }) => code)).toEqual(['23505', '23505']);
    expect(new Set(stores)).toEqual(new Set(['one', 'two']));
  });
});
