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
 * 1. Deferred triggers run, and deferred constraints are checked, with the role and the settings of the work (PostgreSQL: "SET CONSTRAINTS").
 * 2. Settings that were local to the work are put back: they outlive RELEASE.
 * 3. All constraints are deferred, or not, as they are at the beginning of a transaction: SET CONSTRAINTS outlives RELEASE too, and would
 *    fail the next request for what is valid at its end.
 *
 * @param settings literals
 */
export function commitSql(savepoint: string, settings: [name: string, value: string][]): string {
  return [
    RUN_TRIGGERS,
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

/**
 * One after the other, so that what they cause waits for its own turn, as at COMMIT: with ALL IMMEDIATE, what the first one stores would be
 * checked before the second one has stored the rest. Twice, for those that cause each other.
 */
const RUN_TRIGGERS = `DO $$
DECLARE
  trigger_name text;
BEGIN
  FOR trigger_name IN
    -- By name: of several with the same one, some may be immediate.
    SELECT pg_catalog.format('%I.%I', nspname, conname) FROM pg_catalog.generate_series(1, 2) AS round, pg_catalog.pg_constraint
      JOIN pg_catalog.pg_namespace ON pg_namespace.oid = connamespace
      WHERE contype = 't' AND pg_catalog.has_schema_privilege(pg_namespace.oid, 'USAGE')
      GROUP BY 1, round HAVING pg_catalog.bool_and(condeferred) ORDER BY round, 1
  LOOP
    EXECUTE 'SET CONSTRAINTS ' || trigger_name || ' IMMEDIATE';
    EXECUTE 'SET CONSTRAINTS ' || trigger_name || ' DEFERRED';
  END LOOP;
END $$`;

const RESET_CONSTRAINTS = `DO $$
DECLARE
  initially_immediate text;
BEGIN
  SET CONSTRAINTS ALL DEFERRED;
  -- By name: of several with the same one, some may be deferred.
  SELECT pg_catalog.string_agg(name, ', ') INTO initially_immediate FROM (
    SELECT pg_catalog.format('%I.%I', nspname, conname) AS name
      FROM pg_catalog.pg_constraint JOIN pg_catalog.pg_namespace ON pg_namespace.oid = connamespace
      WHERE condeferrable AND pg_catalog.has_schema_privilege(pg_namespace.oid, 'USAGE')
      GROUP BY 1 HAVING NOT pg_catalog.bool_or(condeferred)
  ) AS constraints;
  IF initially_immediate IS NOT NULL THEN
    EXECUTE 'SET CONSTRAINTS ' || initially_immediate || ' IMMEDIATE';
  END IF;
END $$`;
