import express from 'express';
import { sessionErrorHandler, sessionMiddleware, withSession } from 'express-knex-session';
import type { Knex } from 'knex';
import createKnex from 'knex';
import { Pool } from 'pg';
import { optionDefinitions } from '../lib/resolve-options';
import { mistaken } from './support/docs';
import { failOnWarnings } from './support/warnings';

failOnWarnings();

// Never connects: all of this is seen when the app starts.
const knex = createKnex({ client: 'pg' });
const url = 'postgres://app:hunter2@db.example.com/app';

/** The error of a call that must fail, thrown or rejected. */
async function errorFrom(call: () => unknown): Promise<Error> {
  try {
    await call();
  } catch (error) {
    return error as Error;
  }
  throw new Error('It was accepted.');
}

describe.each([
  ['sessionMiddleware', (value: unknown) => sessionMiddleware(mistaken(value))],
  ['withSession', (value: unknown) => withSession(mistaken(value), async () => {})],
])('when %s is given something else than a Knex instance', (_name, call) => {
  it.each<[string, unknown, RegExp]>([
    ['nothing', undefined, /got undefined\..*knex\(\{ client: .pg./],
    ['null', null, /got null\..*knex\(\{ client: .pg./],
    ['the configuration', { client: 'pg', connection: url }, /got its configuration\..*knex\(config\)/],
    ['a promise of Knex', Promise.resolve(knex), /got a promise\. Await it/],
    ['a query', knex('accounts'), /got a query\. Pass knex itself/],
    ['the function that makes instances', createKnex, /a function \(knex\)\..*knex\(\{ client: .pg./],
    ['a pool of pg', new Pool({ connectionString: url }), /got a pg\.Pool\. .*knex\(\{ client: 'pg', connectionPool: pool \}\)/],
    ['an Express app', express(), /got a function \(app\)/],
    ['a number', 5, /got 5/],
  ])('says what to do: %s', async (_case, value, advice) => {
    const error = await errorFrom(() => call(value));
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toMatch(/^Expected `knex` to be a Knex instance, got /);
    expect(error.message).toMatch(advice);
  });

  it('does not show a connection string: it holds a password, and start-up errors are logged', async () => {
    const error = await errorFrom(() => call(url));
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toMatch(/got a string\..*knex\(\{ client: .pg./);
    expect(error.stack).not.toContain('hunter2');
  });

  it.each(['mysql2', 'sqlite3', 'better-sqlite3', 'mssql', 'oracledb', 'redshift', 'cockroachdb'])(
    'names the dialect that is not supported, and the one that is: %s',
    async (client) => {
      const error = await errorFrom(() => call(createKnex({ client, useNullAsDefault: true })));
      expect(error).toBeInstanceOf(TypeError);
      expect(error.message).toContain(`'${client}'`);
      expect(error.message).toContain("client: 'pg'");
    },
  );

  it('does not call pgnative another database', async () => {
    const error = await errorFrom(() => call(createKnex({ client: 'pgnative' })));
    expect(error.message).toMatch(/'pgnative'.*driver pg/);
    expect(error.message).not.toContain('Only PostgreSQL is supported');
  });

  it("names the dialect of an application's own client class, and does not print its source", async () => {
    const Mysql = require('knex/lib/dialects/mysql2/index.js');
    class Traced extends Mysql {}
    const error = await errorFrom(() => call(createKnex({ client: Traced as unknown as typeof Knex.Client })));
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toMatch(/mysql/);
    expect(error.message).not.toMatch(/class |extends/);
  });
});

describe("when the application has a client class of its own for PostgreSQL, or uses another of Knex's names for it", () => {
  it.each([
    ['a subclass', class extends require('knex/lib/dialects/postgres/index.js') {}],
    ['postgres', 'postgres'],
    ['postgresql', 'postgresql'],
  ])('is accepted: %s', (_case, client) => {
    expect(sessionMiddleware(createKnex({ client: mistaken(client) }))).toBeInstanceOf(Function);
  });
});

describe('when the options are wrong', () => {
  const accepting = (options: unknown) => () => sessionMiddleware(knex, mistaken(options));

  it.each([
    ['null', null],
    ['a number', 5],
    ['a value of one option', 'end'],
    ['a function', () => ({ commitAt: 'end' })],
    ['a list', []],
    ['a Map', new Map([['commitAt', 'end']])],
  ])('is a TypeError that shows what options look like: %s', (_case, options) => {
    expect(accepting(options)).toThrow(TypeError);
    expect(accepting(options)).toThrow(/^Expected options to be an object such as \{ .* \}, got /);
  });

  it.each(['commitat', 'CommitAt', 'COMMITAT'])('asks whether the known option was meant: %s', (name) => {
    expect(accepting({ [name]: 'end' })).toThrow(TypeError);
    expect(accepting({ [name]: 'end' })).toThrow(`Unknown option \`${name}\`. Did you mean \`commitAt\`?`);
  });

  it.each(['comitAt', 'isolation', 'toString', 'constructor'])('lists those that there are: %s', (name) => {
    expect(accepting({ [name]: 'x' })).toThrow(TypeError);
    expect(accepting({ [name]: 'x' })).toThrow(
      `Unknown option \`${name}\`. sessionMiddleware() takes: ${Object.keys(optionDefinitions).join(', ')}.`,
    );
  });

  it.each([
    [{ property: '' }, "Expected `property` to be a non-empty string, got ''."],
    [{ property: Symbol('db') }, 'Expected `property` to be a non-empty string, got Symbol(db).'],
    [{ property: () => 'db' }, 'Expected `property` to be a non-empty string, got a function (property).'],
    [{ commitAt: 'begin' }, "Expected `commitAt` to be 'head', 'end' or 'finish', got 'begin'."],
    [{ commitAt: null }, "Expected `commitAt` to be 'head', 'end' or 'finish', got null."],
    [{ shouldCommit: true }, 'Expected `shouldCommit` to be a function (req, res) => boolean, got true.'],
    [{ onError: 'log' }, "Expected `onError` to be a function (error, req) => void, got 'log'."],
  ])('names the option, what it takes and what it was given: %p', (options, message) => {
    expect(accepting(options)).toThrow(new TypeError(message));
  });
});

describe('when withSession is called in the wrong way', () => {
  const calling = (...values: unknown[]) => errorFrom(() => (withSession as (...values: unknown[]) => unknown)(knex, ...values));

  it.each([
    ['without work', [], 'undefined'],
    ['with a promise', [Promise.resolve()], 'Promise'],
    ['with options in place of work', [{ onError: () => {} }, async () => {}], 'Object'],
  ])('says that work is a function of the session: %s', async (_case, values, got) => {
    const error = await calling(...values);
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toBe(`Expected \`work\` to be a function (session) => ..., got ${got}.`);
  });

  it.each([{ commitAt: 'end' }, { property: 'db' }, { shouldCommit: () => true }])(
    'says that an option of the middleware means nothing here, and which do: %p',
    async (options) => {
      const error = await calling(async () => {}, options);
      expect(error).toBeInstanceOf(TypeError);
      expect(error.message).toContain(`\`${Object.keys(options)[0]}\``);
      expect(error.message).toMatch(
        / withSession\(\) takes: acquireTimeout, transactionTimeout, settleTimeout, warnAfter, isolationLevel, readOnly, deferrable, settings, role, onError\.$/,
      );
    },
  );

  it('shows an option that it takes, if the options are not an object', async () => {
    const error = await calling(async () => {}, null);
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toMatch(/such as \{ onError.*got null/);
  });

  it('has run nothing', async () => {
    const work = jest.fn();
    await calling(work, { unknown: true });
    expect(work).not.toHaveBeenCalled();
  });
});

describe('when sessionErrorHandler is given something', () => {
  it.each([[{ property: 'db' }], [knex]])('says that it takes nothing', (value) => {
    const call = () => (sessionErrorHandler as (value: unknown) => unknown)(value);
    expect(call).toThrow(TypeError);
    expect(call).toThrow(/no arguments.*app\.use\(sessionErrorHandler\(\)\)/);
  });
});
