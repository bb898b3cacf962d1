import express, { type NextFunction, type Request, type RequestHandler, type Response } from 'express';
import { retryable } from 'express-knex-session';
import { openSite, type Site, type SiteOptions } from './deadlines';
import { insert, type Ledger } from './ledger';

/** A handler that is told the number of its attempt, from 1. */
export type Work = (req: Request, res: Response, next: NextFunction, attempt: number) => unknown;

export interface Serving extends SiteOptions {
  /** Those of retryable(). */
  attempts?: number;
  /** What stands between the session and the handler. */
  before?: RequestHandler[];
  after?: RequestHandler[];
}

export interface Retrying extends Site {
  /** How often the handler has run for this path. */
  ran(path?: string): number;
}

/** Serves by a retryable handler. Also on Express 4 an async one needs nothing around it. */
export function retrying(ledger: Ledger): (work: Work, options?: Serving) => Promise<Retrying> {
  return async (work, { attempts = 3, before = [], after = [], ...options } = {}) => {
    const ran = new Map<string, number>();
    const handler = retryable(
      (req, res, next) => {
        const attempt = (ran.get(req.path) ?? 0) + 1;
        ran.set(req.path, attempt);
        return work(req, res, next, attempt);
      },
      { attempts },
    );
    const site = await openSite(ledger, { routes: (app) => app.use(express.json(), ...before, handler, ...after) }, options);
    return Object.assign(site, { ran: (path = '/') => ran.get(path) ?? 0 });
  };
}

/** An error as of a transaction that the server has given up for the sake of another one. */
export function transient(): Error {
  return Object.assign(new Error('could not serialize'), { code: '40001' });
}

/** Writes what may be committed. */
export const store = (req: Request, attempt: number) => insert(req, `stored by ${attempt}`);

/** Writes what COMMIT refuses with 40001. */
export const conflict = (req: Request, attempt: number) => insert(req, `refused ${attempt}`, 'conflict');
