/** The SQL by which a savepoint passes for a transaction. */

export function beginSql(savepoint: string, readOnly = false): string {
  return `SAVEPOINT ${savepoint}${readOnly ? '; SET LOCAL transaction_read_only = on' : ''}`;
}

export function rollbackSql(savepoint: string): string {
  return `ROLLBACK TO SAVEPOINT ${savepoint}; RELEASE SAVEPOINT ${savepoint}`;
}

/**
 * What COMMIT would do, inside of a transaction that goes on:
 *
 * 1. Deferred constraints are checked, and deferred triggers run, with the role and the settings of the work (PostgreSQL: "SET CONSTRAINTS").
 * 2. Settings that were local to the work are put back: they outlive RELEASE.
 * 3. All constraints are deferred, or not, as they are at the beginning of a transaction: SET CONSTRAINTS outlives RELEASE too, and would
 *    fail the next request for what is valid at its end.
 *
 * @param settings literals
 */
export function commitSql(savepoint: string, settings: [name: string, value: string][]): string {
  return [
    'SET CONSTRAINTS ALL IMMEDIATE',
    // A name that does not exist reads as null.
    ...settings.map(
      ([name, value]) =>
        `SELECT pg_catalog.set_config(${name}, ${value}, true) WHERE coalesce(pg_catalog.current_setting(${name}, true), '') <> ${value}`,
    ),
    RESET_CONSTRAINTS,
    `RELEASE SAVEPOINT ${savepoint}`,
  ].join(';\n');
}

const RESET_CONSTRAINTS = `DO $$
DECLARE
  initially_immediate text;
BEGIN
  SET CONSTRAINTS ALL DEFERRED;
  SELECT string_agg(DISTINCT format('%I.%I', nspname, conname), ', ') INTO initially_immediate
    FROM pg_catalog.pg_constraint JOIN pg_catalog.pg_namespace ON pg_namespace.oid = connamespace
    WHERE condeferrable AND NOT condeferred AND pg_catalog.has_schema_privilege(pg_namespace.oid, 'USAGE');
  IF initially_immediate IS NOT NULL THEN
    EXECUTE 'SET CONSTRAINTS ' || initially_immediate || ' IMMEDIATE';
  END IF;
END $$`;
