import type { Request, Response } from 'express';
import { type CommitAt, type SessionOptions, sessionMiddleware, type WithSessionOptions } from 'express-knex-session';
import createKnex from 'knex';

const knex = createKnex({ client: 'pg' });

sessionMiddleware(knex, {});
sessionMiddleware(knex, undefined);
sessionMiddleware(knex, {
  property: 'db',
  commitAt: (req) => (req.path.startsWith('/export') ? 'end' : 'head'),
  shouldCommit: (req, res) => res.statusCode < 400 || req.path === '/login',
  onError: (error, req) => console.error(error, req?.originalUrl),
});
for (const commitAt of ['head', 'end', 'finish'] as const) sessionMiddleware(knex, { commitAt });

// Settings that may not be there: undefined means the default.
const settings: { property: string | undefined; commitAt: CommitAt | undefined } = { property: undefined, commitAt: undefined };
sessionMiddleware(knex, settings);

const options: SessionOptions = { shouldCommit: (req: Request, res: Response) => req.xhr && res.statusCode < 400 };
const fewer: WithSessionOptions = { onError: () => {} };
sessionMiddleware(knex, { ...options, ...fewer });

// @ts-expect-error: misspelt
sessionMiddleware(knex, { comitAt: 'end' });
// @ts-expect-error: no such moment
sessionMiddleware(knex, { commitAt: 'begin' });
// @ts-expect-error: no such moment
sessionMiddleware(knex, { commitAt: () => 'begin' });
// @ts-expect-error: at once
sessionMiddleware(knex, { commitAt: async () => 'end' });
// @ts-expect-error: a value only
sessionMiddleware(knex, { property: () => 'db' });
// @ts-expect-error: at once
sessionMiddleware(knex, { shouldCommit: async () => true });
// @ts-expect-error: true or false
sessionMiddleware(knex, { shouldCommit: () => {} });
// @ts-expect-error: not null
sessionMiddleware(knex, null);
// @ts-expect-error: a request is not always there
sessionMiddleware(knex, { onError: (_error, req) => console.error(req.originalUrl) });
// @ts-expect-error: unknown, as in a catch
sessionMiddleware(knex, { onError: (error) => console.error(error.message) });
