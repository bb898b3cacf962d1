import type { Session } from 'express-knex-session';
import { failOnWarnings } from './support/warnings';
import { useBench } from './support/wire';

failOnWarnings();

const PROGRAMS = 400;

/** The same numbers for the same seed (mulberry32), so that a failure can be run again. */
function numbers(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/** One insert, the savepoints around it, and what its caller was told. */
interface Insert {
  name: string;
  within: Savepoint[];
  outcome?: 'done' | 'refused';
}
interface Savepoint {
  outcome?: 'done' | 'refused';
}

/** Does random things with a session, and remembers what it was told of each. */
class Program {
  readonly inserts: Insert[] = [];
  readonly log: string[] = [];
  private readonly works: Promise<unknown>[] = [];

  constructor(private readonly random: () => number) {}

  async run(session: Session, within: Savepoint[] = []): Promise<void> {
    const steps = Math.floor(this.random() * 5);
    for (let i = 0; i < steps; i++) {
      const kind = this.random();
      if (kind < 0.3) await this.insert(session, within);
      else if (kind < 0.45) void this.insert(session, within);
      else if (kind < 0.6) await Promise.all([this.insert(session, within), this.insert(session, within), this.step(session, within)]);
      else await this.step(session, within);
    }
  }

  /** Nobody reads it, so that what is issued after it could wait for ever: only at the end. */
  leaveStream(session: Session): void {
    const stream = session.raw('select n from generate_series(1, 1000) n').stream();
    // Without a listener, Node takes an error for an uncaught one.
    stream.on('error', () => {});
  }

  /** Nothing may be left hanging. */
  async settled(): Promise<void> {
    await Promise.all(this.works);
  }

  private async step(session: Session, within: Savepoint[]): Promise<void> {
    const kind = this.random();
    if (kind < 0.35 && within.length < 2) return this.maybeAwaited(this.savepoint(session, within));
    if (kind < 0.5) return this.maybeAwaited(this.read(session, this.random() < 0.5 ? 3 : 1_000));
    if (kind < 0.62) return this.follow('bad', session('items').insert({ name: 'bad' }));
    if (kind < 0.7) return this.follow('two', session.raw('select 1; select 2'));
    await this.insert(session, within);
  }

  private async maybeAwaited(work: Promise<unknown>): Promise<void> {
    if (this.random() < 0.7) await work;
  }

  private insert(session: Session, within: Savepoint[]): Promise<void> {
    const insert: Insert = { name: `${this.inserts.length}`, within };
    this.inserts.push(insert);
    return this.follow(`insert ${insert.name}`, session('items').insert({ name: insert.name }), insert);
  }

  private savepoint(session: Session, within: Savepoint[]): Promise<void> {
    const savepoint: Savepoint = {};
    const fails = this.random() < 0.4;
    const work = session.transaction(async (trx) => {
      await this.run(trx as Session, [...within, savepoint]);
      if (fails) throw new Error('rolled back to');
    });
    return this.follow('savepoint', work, savepoint);
  }

  private read(session: Session, limit: number): Promise<void> {
    const read = async () => {
      let count = 0;
      for await (const _ of session.raw('select n from generate_series(1, 1000) n').stream()) if (++count >= limit) break;
    };
    return this.follow('read', read());
  }

  private follow(what: string, work: PromiseLike<unknown>, of: { outcome?: 'done' | 'refused' } = {}): Promise<void> {
    const followed = Promise.resolve(
      work.then(
        () => {
          of.outcome = 'done';
          this.log.push(`${what}: done`);
        },
        (error) => {
          of.outcome = 'refused';
          this.log.push(`${what}: ${error.code ?? error.message}`);
        },
      ),
    );
    this.works.push(followed);
    return followed;
  }
}

describe(`when ${PROGRAMS} handlers do random things`, () => {
  const bench = useBench({ pool: { min: 0, max: 2 } });

  it('stores what each was told, all of it or nothing, and leaves the pool at rest', async () => {
    const counts = { stored: 0, refused: 0 };
    for (let seed = 1; seed <= PROGRAMS; seed++) {
      const random = numbers(seed);
      const program = new Program(random);
      const answer = await bench.answer(async (req, res) => {
        await program.run(req.session);
        if (random() < 0.2) program.leaveStream(req.session);
        const end = random();
        if (end < 0.1) throw new Error('of the app');
        res.sendStatus(end < 0.2 ? 400 : 200);
      });
      await program.settled();

      const isStored = ({ outcome, within }: Insert) => outcome === 'done' && within.every((savepoint) => savepoint.outcome === 'done');
      const promised = answer.status === 200 ? program.inserts.filter(isStored).map(({ name }) => name) : [];
      const stored = (await bench.stored()).sort((a, b) => Number(a) - Number(b));
      const about = `seed ${seed}, ${answer.status} ${answer.body}, ${program.log.join(', ')}`;
      expect({ about, stored }).toEqual({ about, stored: promised });
      counts[answer.status === 200 ? 'stored' : 'refused'] += 1;
      await bench.rest();
      await bench.database.admin('items').delete();
    }
    // A test that only ever sees one kind of end shows nothing.
    expect(counts.stored).toBeGreaterThan(PROGRAMS / 4);
    expect(counts.refused).toBeGreaterThan(PROGRAMS / 8);
  }, 60_000);
});
