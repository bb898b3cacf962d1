// Knex's own register of tables is in force on a session.

import type { Request } from 'express';
import type {} from 'express-knex-session';

declare module 'knex/types/tables.js' {
  interface Tables {
    registered: { id: number; text: string };
  }
}

export async function texts(req: Request): Promise<string[]> {
  // @ts-expect-error: no such column
  req.session('registered').where({ txt: 'x' });
  return req.session('registered').pluck('text');
}
