import { randomUUID } from 'node:crypto';
import type { RequestHandler } from 'express';

declare global {
  namespace Express {
    interface Request {
      /** In the response's header X-Request-Id, and in the rows that the request has stored: see migrations/003-request-ids.ts. */
      id: string;
    }
  }
}

export const requestId: RequestHandler = (req, res, next) => {
  req.id = randomUUID();
  res.set('X-Request-Id', req.id);
  next();
};
