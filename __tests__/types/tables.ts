// Knex's own register of tables is in force on a session, and so are a session's own records.
import type { Request } from 'express';
import { currentSession, getSession, type Session, scopedSession, withSession } from 'express-knex-session';
import createKnex, { type Knex } from 'knex';
import type { Equal, Expect } from './equal.js';

interface Row {
  id: number;
  text: string;
}

declare module 'knex/types/tables.js' {
  interface Tables {
    registered: { id: number; text: string };
    composite: Knex.CompositeTableType<Row, Pick<Row, 'text'>, Partial<Omit<Row, 'id'>>>;
  }
}

export async function texts(req: Request): Promise<string[]> {
  // @ts-expect-error: no such column
  req.session('registered').where({ txt: 'x' });
  const first = await req.session('registered').first();
  type _first = Expect<Equal<typeof first, Row | undefined>>;
  const named = await req.session('registered').select('text');
  type _named = Expect<Equal<typeof named, Pick<Row, 'text'>[]>>;
  return getSession(req)('registered').pluck('text');
}

export async function composite({ session }: Request): Promise<void> {
  const stored = await session('composite').insert({ text: 'x' }).returning('id');
  type _stored = Expect<Equal<typeof stored, Pick<Row, 'id'>[]>>;
  // @ts-expect-error: the server gives the id
  await session('composite').insert({ id: 1, text: 'x' });
  // @ts-expect-error: which stays
  await session('composite').update({ id: 2 });
  await session.transaction(async (savepoint) => {
    // @ts-expect-error: no such column
    await savepoint('composite').update({ txt: 'x' });
  });
}

const knex = createKnex({ client: 'pg' });
/** Whatever gives a session gives it with the tables. */
export async function elsewhere(): Promise<void> {
  const rows = await withSession(knex, (session) => session('registered').select());
  type _rows = Expect<Equal<typeof rows, Row[]>>;
  const current = await currentSession()('registered').select();
  type _current = Expect<Equal<typeof current, Row[]>>;
  const scoped = await scopedSession(knex)('registered').select();
  type _scoped = Expect<Equal<typeof scoped, Row[]>>;
}

/** A session of one kind of records, as Knex's own Knex<TRecord>. */
export async function ofRows(session: Session<Row>): Promise<void> {
  const trx: Knex.Transaction<Row> = session;
  const rows = await session('anything').select('*');
  type _rows = Expect<Equal<typeof rows, Row[]>>;
  // @ts-expect-error: no such column
  trx('anything').where({ txt: 'x' });
  session.setRollbackOnly();
}
export const given = (req: Request): Promise<void> => ofRows(req.session);
