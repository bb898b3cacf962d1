import type { Knex } from 'knex';

/**
 * What makes it a ledger, for whoever writes to the tables. Both rules are checked at COMMIT: in between, a transfer
 * has one entry, and an account may wait for the money that it passes on.
 *
 * 1. `entries_sum_to_zero`: the entries of a transfer sum to zero. The same trigger adds each entry to its account's balance.
 * 2. `accounts_not_overdrawn`: no account ends below zero, except those of kind 'external', where money comes from.
 * 3. Entries are final: a mistake is put right by a transfer back.
 */
export async function up(knex: Knex): Promise<void> {
  await knex.raw(`
    create function post_entry() returns trigger language plpgsql as $$
    begin
      -- In the order of their ids, or opposite transfers deadlock. And NO KEY UPDATE, which lets the KEY SHARE locks
      -- pass that the foreign key of every new entry holds: with FOR UPDATE any two transfers deadlock on them.
      perform from accounts
        where id in (select account_id from entries where transfer_id = new.transfer_id)
        order by id for no key update;

      if (select sum(amount) from entries where transfer_id = new.transfer_id) <> 0 then
        raise exception 'the entries of a transfer do not sum to zero'
          using errcode = 'check_violation', constraint = 'entries_sum_to_zero', table = 'entries';
      end if;

      update accounts set balance = balance + new.amount where id = new.account_id;
      return null;
    end $$;

    create constraint trigger entries_sum_to_zero after insert on entries
      deferrable initially deferred for each row execute function post_entry();

    create function check_balance() returns trigger language plpgsql as $$
    begin
      -- Not new.balance: that was the balance after one entry, and others may have followed.
      if exists (select from accounts where id = new.id and kind <> 'external' and balance < 0) then
        raise exception 'an account is overdrawn'
          using errcode = 'check_violation', constraint = 'accounts_not_overdrawn', table = 'accounts';
      end if;
      return null;
    end $$;

    create constraint trigger accounts_not_overdrawn after insert or update on accounts
      deferrable initially deferred for each row when (new.balance < 0) execute function check_balance();

    create function refuse_change() returns trigger language plpgsql as $$
    begin
      raise exception 'entries are final' using errcode = 'restrict_violation', constraint = 'entries_final', table = 'entries';
    end $$;

    create trigger entries_final before update or delete or truncate on entries
      for each statement execute function refuse_change();
  `);
}

export async function down(knex: Knex): Promise<void> {
  await knex.raw(`
    drop trigger entries_final on entries;
    drop trigger accounts_not_overdrawn on accounts;
    drop trigger entries_sum_to_zero on entries;
    drop function refuse_change, check_balance, post_entry;
  `);
}
