import * as expressKnexSession from 'express-knex-session';
import { plainTypes } from './doc-comments';

const constants = (names: string[], type: string) => names.map((name) => `const ${name}: ${type};`).join('\n');

/** What an example may use of those before it, or of the reader's app: declarations, in TypeScript. */
export const ambient = `
  import type expressModule from 'express';
  import type { ErrorRequestHandler as Handler, Express, Request, RequestHandler, Response } from 'express';
  import type * as ours from 'express-knex-session';
  import type { Knex } from 'knex';
  declare global {
    const express: typeof expressModule;
    const createKnex: typeof import('knex').default;
    const config: Knex.Config;
    const knex: Knex;
    const app: Express;
    const server: import('node:http').Server;
    ${Object.keys(expressKnexSession)
      .map((name) => `const ${name}: typeof ours.${name};`)
      .join('\n')}
    const once: typeof import('node:events').once;
    const delay: typeof import('node:timers/promises').setTimeout;

    type ErrorRequestHandler = Handler;
    ${plainTypes.map((name) => `type ${name} = ours.${name};`).join('\n')}

    const req: Request;
    const res: Response;
    const handler: RequestHandler;
    const routes: RequestHandler;
    const showAccount: RequestHandler;
    const error: unknown;
    const sessions: ours.SessionMiddleware;
    const session: ours.Session;

    const hash: (password: string) => string;
    const tenantOf: (req: Request) => number;
    const sessionMetrics: (knex: Knex, sessions: ours.SessionMiddleware) => { handler: RequestHandler; stop(): void };
    const isOn: (flag: string, req: Request) => boolean;
    const sendMail: (about: object) => Promise<void>;
    const charge: (order: string, options: { signal: AbortSignal }) => Promise<string>;
    const chargeCard: (order: object) => Promise<object>;
    const perform: (job: object, session: ours.Session) => Promise<void>;
    const report: (session: ours.Session) => Promise<object>;
    const transfer: (session: Knex, body: object) => Promise<void>;
    const store: (order: object) => Promise<void>;
    const isStored: (order: object) => Promise<boolean>;
    const mails: { send(mail: object): Promise<void> };
    const files: { remove(file: object): Promise<void> };
    const log: Record<'debug' | 'info' | 'warn' | 'error', (...values: unknown[]) => void>;
    ${constants(['debit', 'credit', 'order', 'user', 'welcome', 'upload', 'receipt'], '{ id: number }')}
    ${constants(['url', 'folder'], 'string')}
    const dryRun: boolean;
    const myErrorHandler: Handler;

    const database: import('express-knex-session/testing').TestDatabase;
    const testDatabase: typeof import('express-knex-session/testing').testDatabase;
    const traceSessions: typeof import('express-knex-session/opentelemetry').traceSessions;
    const provider: import('@opentelemetry/api').TracerProvider;
    const createApp: (knex: Knex) => Express;
    const request: (app: Express) => { post(path: string): { send(body: object): { expect(status: number): Promise<unknown> } } };
    ${constants(['beforeEach', 'afterEach', 'afterAll'], '(hook: () => Promise<void>) => void')}
    const it: (name: string, test: () => Promise<void>) => void;
    const expect: (value: unknown) => { toHaveLength(length: number): void };

    namespace Express {
      interface Request {
        id: string;
        user: { id: number; tenant: number };
      }
    }
  }
`;
