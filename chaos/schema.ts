import { stormSettings } from './kinds';

const { accounts, startBalance } = stormSettings;

/** A double-entry ledger; the deferred trigger refuses some transfers at COMMIT only. */
export const schema = `
  CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL);
  INSERT INTO accounts SELECT id, ${startBalance} FROM generate_series(0, ${accounts - 1}) AS id;
  CREATE TABLE transfers (id text PRIMARY KEY, fails_at_commit boolean NOT NULL DEFAULT false);
  CREATE TABLE entries (transfer text NOT NULL REFERENCES transfers, account int NOT NULL REFERENCES accounts, amount bigint NOT NULL);

  CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
  BEGIN
    RAISE EXCEPTION 'refused at COMMIT' USING ERRCODE = '23514';
  END $$;
  CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON transfers DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.fails_at_commit) EXECUTE FUNCTION refuse();
`;

/** Transfers that have one half only, or halves that do not match; entries that belong to none cannot be. */
export const tornTransfers = `
  SELECT transfers.id FROM transfers LEFT JOIN entries ON entries.transfer = transfers.id
  GROUP BY transfers.id HAVING count(entries) <> 2 OR sum(entries.amount) <> 0
`;

/** How much the accounts have, all together and each by itself, that nobody gave them. */
export const wrongMoney = `
  SELECT coalesce(sum(abs(balance - ${startBalance} - coalesce(moved, 0))), 0)::int + abs(sum(balance) - ${accounts * startBalance})::int AS amount
  FROM accounts LEFT JOIN (SELECT account, sum(amount) AS moved FROM entries GROUP BY account) AS moves ON moves.account = accounts.id
`;

export const applicationName = 'chaos-app';

export const busyBackends = `
  SELECT pid, state, query FROM pg_stat_activity
  WHERE application_name = '${applicationName}' AND (xact_start IS NOT NULL OR state <> 'idle')
`;
