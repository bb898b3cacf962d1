import { isRetryable, SessionError } from 'express-knex-session';
import { DatabaseError } from 'pg';
import { Problem } from './problem';

/**
 * What the client is told about an error. Texts are written here and never taken from the error: the messages of the
 * database hold SQL, and its details hold other people's values.
 */
export function toProblem(error: unknown): Problem {
  if (error instanceof Problem) return error;
  if (isRetryable(error)) return busy('Another request was in the way, and nothing was stored. Send the request again.');
  if (error instanceof SessionError) return ofSession(error);
  if (error instanceof DatabaseError) return ofDatabase(error);
  return ofRequest(error);
}

function ofSession(error: SessionError): Problem {
  switch (error.code) {
    case 'ERR_SESSION_UNAVAILABLE':
      return busy('The ledger cannot be used at the moment. Nothing was stored; send the request again later.');
    case 'ERR_SESSION_TIMEOUT':
      return busy('It took too long, and nothing was stored. Send the request again.');
    case 'ERR_COMMIT_UNKNOWN':
      return new Problem(error.status, 'outcome-unknown', 'It is not known whether the change was stored', {
        detail:
          'The connection to the database was lost while it stored the change. Send a transfer again with the same id: ' +
          'it is stored once, and the answer is the stored one.',
      });
    default:
      return Problem.ofStatus(error.status);
  }
}

function ofDatabase(error: DatabaseError): Problem {
  switch (error.constraint) {
    case 'accounts_not_overdrawn':
      return new Problem(409, 'overdrawn', 'The account does not have that much');
    case 'entries_account_exists':
      return new Problem(422, 'unknown-account', 'The transfer names an account that does not exist');
    default:
      return Problem.ofStatus(500);
  }
}

/** Errors of Express and its body parser, which know that the request is to blame: they carry a status from 400 to 499. */
function ofRequest(error: unknown): Problem {
  const { status, type } = Object(error) as { status?: unknown; type?: unknown };
  if (type === 'entity.parse.failed') return new Problem(400, 'invalid-json', 'The body is not JSON');
  return Problem.ofStatus(typeof status === 'number' && status >= 400 && status < 500 ? status : 500);
}

const busy = (detail: string) => new Problem(503, 'busy', 'The service is busy', { detail, headers: { 'retry-after': '1' } });
