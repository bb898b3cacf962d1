/** Why the ledger cannot start, in words for the person who starts it. */
export class StartError extends Error {}

/** The port of the environment variable PORT. */
export function portFrom(value: string | undefined): number {
  const port = Number(value || 3000);
  if (Number.isInteger(port) && port >= 0 && port <= 65_535) return port;
  throw new StartError(`Expected PORT to be a whole number from 0 to 65535, got '${value}'. For example: PORT=3001 npm start`);
}

/** The database of the environment variable DATABASE_URL, if it is set. Its value is in no message: it holds a password. */
export function databaseUrlFrom(value: string | undefined): string | undefined {
  if (!value || /^postgres(ql)?:\/\//.test(value)) return value || undefined;
  throw new StartError(
    'Expected DATABASE_URL to be like postgres://user:password@host:5432/database. Without it, the app starts its own PostgreSQL.',
  );
}
