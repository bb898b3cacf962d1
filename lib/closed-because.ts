/** Why a session takes no statements any more, and what to do: completes "The session is closed: ...". */

export const RESPONSE_HAS_ENDED =
  'the response has ended. Await every statement before you send the response; for work after it, use withSession().';
export const RESPONSE_HAS_BEGUN =
  "the response has begun, and the session ends before its first byte leaves. Pass { commitAt: 'end' } to keep it open until the response ends.";
export const RESPONSE_IS_UNDER_WAY =
  'the response is under way, and its end can no longer be held: it has declared a length, or has none. Run the first statement before its head leaves.';
export const CLIENT_HAS_GONE =
  "the client has disconnected, and its work was rolled back. Pass { onDisconnect: 'finish' } if it must be done all the same.";
export const ANOTHER_ATTEMPT =
  'its attempt has failed, and the handler runs again (retryable). Await every statement before the handler ends.';
export const OPTIONS_CAME_LATE =
  'sessionOptions() came after the first statement, or hook, of the session. Mount it before whatever runs statements.';
export const AN_ERROR_WAS_PASSED_ON =
  'an error went to the error handlers, and has rolled it back. For work in an error handler, use withSession().';
