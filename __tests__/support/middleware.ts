import { createRequire } from 'node:module';
import { Writable } from 'node:stream';
import type { RequestHandler } from 'express';
import { expressSession } from './express-session';

// Some have no types, and those of others would claim `req.session` for every test of the project.
const load = createRequire(__filename);
const compression = load('compression') as (options: object) => RequestHandler;
const cookieSession = load('cookie-session') as (options: object) => RequestHandler;
const cors = load('cors') as (options: object) => RequestHandler;
const helmet = load('helmet') as () => RequestHandler;
const morgan = load('morgan') as (format: string, options: { stream: { write(line: string): void } }) => RequestHandler;
const pinoHttp = load('pino-http') as (options: object, stream: Writable) => RequestHandler;
const { rateLimit } = load('express-rate-limit') as { rateLimit(options: object): RequestHandler };
const multer = load('multer') as (options?: object) => { any(): RequestHandler; single(name: string): RequestHandler };

export { cookieSession, cors, multer, rateLimit };

/** Told of each line of a logger: the status in it. */
export type Log = (status: number | undefined) => void;

/** morgan, noting the status that it logs; undefined where it logs none. */
export const morganTo = (log: Log): RequestHandler =>
  morgan(':status', { stream: { write: (line) => log(line.trim() === '-' ? undefined : Number(line)) } });

/** pino-http, noting the status that it logs. */
export const pinoTo = (log: Log): RequestHandler =>
  pinoHttp(
    {},
    new Writable({
      write(line, _encoding, done) {
        log(JSON.parse(String(line)).res?.statusCode);
        done();
      },
    }),
  );

/** Each as an app mounts it, in front of all routes. */
export const middlewares: Record<string, () => RequestHandler> = {
  compression: () => compression({ threshold: 0 }),
  'express-session': () => expressSession({ secret: 'secret', resave: false, saveUninitialized: false }),
  'cookie-session': () => cookieSession({ keys: ['key'] }),
  helmet: () => helmet(),
  cors: () => cors({ origin: 'https://app.example', credentials: true }),
  morgan: () => morganTo(() => {}),
  'pino-http': () => pinoTo(() => {}),
  'express-rate-limit': () => rateLimit({ standardHeaders: 'draft-8', legacyHeaders: false, limit: 100 }),
  multer: () => multer().any(),
};
