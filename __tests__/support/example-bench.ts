import { transformSync } from '@swc/core';
import express, { type ErrorRequestHandler, type Express } from 'express';
import * as expressKnexSession from 'express-knex-session';
import type { Knex } from 'knex';
import { createDatabase, type TestDatabase } from './database';
import { type Listening, listen } from './http';
import { eventually, poolUsage } from './pool';

const AsyncFunction = (async () => {}).constructor as new (...values: string[]) => (...values: unknown[]) => Promise<any>;

/**
 * Runs an example with what it imports, and what it takes for granted, from `scope`.
 *
 * @param result an expression: what to give back of its variables
 */
export async function runExample(code: string, scope: Record<string, unknown>, result = 'undefined'): Promise<any> {
  const { code: javascript } = transformSync(code, {
    jsc: { parser: { syntax: 'typescript' }, target: 'es2022' },
    module: { type: 'es6' },
  });
  const body = javascript.replace(/^import .*$|^export \{.*$|^app\.listen\(.*$/gm, '');
  // A block: the example may declare a name that the scope has too.
  return new AsyncFunction(...Object.keys(scope), `{ ${body}\n return ${result}; }`)(...Object.values(scope));
}

export const answerStatus: ErrorRequestHandler = (error, _req, res, _next) => {
  res.status(error.status ?? 500).send(error.code ?? error.message);
};

/** A database for the examples of a test file, and what runs them on it. */
export class ExampleBench {
  database!: TestDatabase;
  knex!: Knex;
  private server: Listening | undefined;

  /** Call it once, at the top of the file. @param tables the SQL that makes them; they are emptied after each test */
  static use(tables: string): ExampleBench {
    const bench = new ExampleBench();
    beforeAll(async () => {
      bench.database = await createDatabase();
      bench.knex = bench.database.knex();
      await bench.database.admin.raw(tables);
    });
    afterEach(() => bench.clear());
    afterAll(() => bench.database.drop());
    return bench;
  }

  /** An app with the middleware, for examples that show a part of one. */
  app(): Express {
    return express().use(express.json(), expressKnexSession.sessionMiddleware(this.knex));
  }

  /** What an example imports, and what it takes for granted. */
  scope(app: Express): Record<string, unknown> {
    return { ...expressKnexSession, express, createKnex: () => this.knex, knex: this.knex, app };
  }

  /** Runs an example on an app, makes the app listen, and gives its address. */
  async serve(code: string, { app = this.app(), ...scope }: { app?: Express; [name: string]: unknown } = {}): Promise<string> {
    const shown: Express = await runExample(code, { ...this.scope(app), ...scope }, 'app');
    // Each example ends where the reader's own error handler may follow.
    shown.use(expressKnexSession.sessionErrorHandler(), answerStatus);
    return this.listen(shown);
  }

  async listen(app: Express): Promise<string> {
    this.server = await listen(app);
    return this.server.url;
  }

  /** What the database is told during some work. */
  async sqlOf(work: () => Promise<unknown>, knex = this.knex): Promise<string[]> {
    const statements: string[] = [];
    const listener = ({ sql }: { sql: string }) => statements.push(sql);
    knex.on('query', listener);
    await work();
    knex.removeListener('query', listener);
    return statements;
  }

  /** Of itself after each test. */
  async close(): Promise<void> {
    await this.server?.close();
    this.server = undefined;
  }

  private async clear(): Promise<void> {
    await this.close();
    // A read-only transaction is given back after the response.
    await eventually(() => expect(poolUsage(this.knex).used).toBe(0));
    const tables = await this.database.admin('pg_tables').where({ schemaname: 'public' }).pluck('tablename');
    await this.database.admin.raw(`TRUNCATE ${tables.join(', ')} RESTART IDENTITY`);
  }
}
