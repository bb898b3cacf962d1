// A file of an app that imports nothing of the package.
import type { RequestHandler } from 'express';
import type { Equal, Expect } from './equal.js';

export interface User {
  id: number;
  name: string;
}

export const rename: RequestHandler<{ id: string }, number, { name: string }> = async (req, res) => {
  const count = await req.session<User>('users').where('id', req.params.id).update({ name: req.body.name });
  type _count = Expect<Equal<typeof count, number>>;
  res.json(count);
};
