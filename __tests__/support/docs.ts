import type { Server } from 'node:http';
import type { ErrorRequestHandler, Express } from 'express';
import express from 'express';
import type { Knex } from 'knex';
import { createDatabase, type TestDatabase } from './database';
import { type Answer, get, listen, post } from './http';

export interface TestApp {
  get(path: string): Promise<Answer>;
  post(path: string, body?: object): Promise<Answer>;
  server: Server;
  /** What reached the error handler at the end of the app, in order. */
  errors: any[];
  close(): Promise<void>;
}

/** An app whose last error handler keeps the error and answers with its status, or `errorStatus`. */
export async function startApp(mount: (app: Express) => void, errorStatus?: number): Promise<TestApp> {
  const errors: unknown[] = [];
  const app = express();
  mount(app);
  const keepError: ErrorRequestHandler = (error, _req, res, _next) => {
    errors.push(error);
    res.status(errorStatus ?? error?.status ?? 500).send('error');
  };
  app.use(keepError);
  const { url, server, close } = await listen(app);
  return { get: (path) => get(url + path), post: (path, body) => post(url + path, body), server, errors, close };
}

/** Starts an app, asks it for `/`, and gives the answer and the error that came of it. */
export async function errorOf(mount: (app: Express) => void): Promise<{ answer: Answer; error: any }> {
  const app = await startApp(mount);
  try {
    const answer = await app.get('/');
    return { answer, error: app.errors[0] };
  } finally {
    await app.close();
  }
}

/** A value that TypeScript would refuse, for tests of what JavaScript lets through. */
export function mistaken(value?: unknown): never {
  return value as never;
}

export interface Notes {
  database: TestDatabase;
  knex: Knex;
  /** What is in the table `notes (text)`, which is emptied after each test. */
  stored(): Promise<string[]>;
}

/** A database of its own for a test file; call it once, at the top. What it returns is there when the tests run. */
export function useNotes(): Notes {
  const notes = { stored: async () => notes.database.admin('notes').pluck('text') } as Notes;
  beforeAll(async () => {
    notes.database = await createDatabase();
    notes.knex = notes.database.knex();
    await notes.database.admin.schema.createTable('notes', (table) => table.text('text'));
  });
  afterEach(() => notes.database.admin('notes').del());
  afterAll(() => notes.database.drop());
  return notes;
}
