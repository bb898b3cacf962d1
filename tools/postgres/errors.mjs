/** An error whose message says all there is to say: PostgreSQL's log is not shown with it. */
export class KnownError extends Error {}
