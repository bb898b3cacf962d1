import type { ErrorRequestHandler, RequestHandler } from 'express';
import { Problem } from './problem';
import { toProblem } from './to-problem';

/** Mounted after all routes. */
export const notFound: RequestHandler = () => {
  throw Problem.ofStatus(404);
};

/** Mounted last: the only place that answers errors. `log` gets those that are the server's fault. */
export function problemHandler(log: (error: unknown) => void): ErrorRequestHandler {
  return function problemHandler(error, _req, res, _next) {
    const problem = toProblem(error);
    if (problem.status >= 500 && !clientLeft(error)) log(error);
    if (res.headersSent) {
      res.destroy(); // Half an answer cannot become a problem any more, but it must not look complete.
      return;
    }
    res.status(problem.status).set(problem.headers).type('application/problem+json').json(problem.body);
  };
}

const clientLeft = (error: unknown): boolean => (error as { code?: unknown } | null)?.code === 'ERR_STREAM_PREMATURE_CLOSE';
