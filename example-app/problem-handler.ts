import type { ErrorRequestHandler, RequestHandler, Response } from 'express';
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
    if (problem.status >= 500 && !isClientGone(error, res)) log(error);
    if (res.headersSent) {
      res.destroy(); // Half an answer cannot become a problem any more, but it must not look complete.
      return;
    }
    res.status(problem.status).set(problem.headers).type('application/problem+json').json(problem.body);
  };
}

/** Whether the error only says that the client went away. A response that was destroyed because of an error has it in `errored`. */
function isClientGone(error: unknown, res: Response): boolean {
  const { code } = Object(error) as { code?: unknown };
  return res.destroyed && !res.errored && (code === 'ERR_SESSION_CLOSED' || code === 'ERR_STREAM_PREMATURE_CLOSE');
}
