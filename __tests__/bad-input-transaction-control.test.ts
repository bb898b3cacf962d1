import { sessionMiddleware, withSession } from 'express-knex-session';
import { errorOf, useNotes } from './support/docs';
import { poolUsage } from './support/pool';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

const notes = useNotes();

// Scenario 77, hazard 33.
describe('when a raw statement would end the transaction', () => {
  const statements = [
    'COMMIT',
    'commit work;',
    'ROLLBACK',
    'END',
    'ABORT',
    'BEGIN',
    'START TRANSACTION',
    "PREPARE TRANSACTION 'x'",
    'COMMIT AND CHAIN',
    '-- done\nCOMMIT',
    '/* a /* nested */ comment */ ROLLBACK',
    'SELECT 1; COMMIT',
    'COMMIT; BEGIN',
    'SELECT 1; COMMIT; BEGIN',
    '/**/ COMMIT AND CHAIN',
  ];

  // Swallowed or not: whoever asked for a ROLLBACK must not find the work committed.
  it.each(statements)('names the mistake and session.commit(): %s', async (sql) => {
    const call = withSession(notes.knex, async (session) => {
      await session('notes').insert({ text: 'before' });
      await session.raw(sql).catch(() => {});
      await session('notes').insert({ text: 'after' });
    });
    await expect(call).rejects.toMatchObject({ code: 'ERR_TRANSACTION_CONTROL', status: 500 });
    await expect(call).rejects.toThrow(/session\.commit\(\)/);
    expect(await notes.stored()).not.toContain('after');
    expect(poolUsage(notes.knex).used).toBe(0);
  });

  it.each(statements)('does so as the first statement: %s', async (sql) => {
    await expect(withSession(notes.knex, (session) => session.raw(sql).then(() => {}))).rejects.toMatchObject({
      code: 'ERR_TRANSACTION_CONTROL',
    });
    expect(poolUsage(notes.knex).used).toBe(0);
  });

  it('answers with an error over HTTP, whatever the handler sends', async () => {
    const { answer, error } = await errorOf((app) => {
      app.use(sessionMiddleware(notes.knex));
      app.get('/', async (req, res) => {
        await req.session('notes').insert({ text: 'before' });
        await req.session.raw('COMMIT').catch(() => {});
        res.send('stored');
      });
    });
    expect(answer.status).toBe(500);
    expect(error).toMatchObject({ code: 'ERR_TRANSACTION_CONTROL' });
  });

  it.each([
    'SAVEPOINT a',
    'SAVEPOINT a; ROLLBACK TO a',
    'SAVEPOINT a; RELEASE a',
    "SELECT 'COMMIT; BEGIN'",
    'SET CONSTRAINTS ALL IMMEDIATE',
  ])('leaves alone what does not: %s', async (sql) => {
    await withSession(notes.knex, async (session) => {
      await session('notes').insert({ text: 'before' });
      await session.raw(sql);
      await session('notes').insert({ text: 'after' });
    });
    expect(await notes.stored()).toEqual(['before', 'after']);
  });
});
