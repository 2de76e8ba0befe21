-- After a restore: a series of numbers goes on after the archive's, whichever series it is, and never back.
begin;
set local search_path = public, extensions, tap;
select plan(13);

create function pg_temp.refused(statement text) returns text
language plpgsql as $$
begin
  execute statement;
  return 'not refused';
exception when sqlstate 'PGRST' then
  return sqlerrm::jsonb ->> 'code';
end
$$;
create function pg_temp.last_invoice(month text) returns integer
language sql stable as $$ select last_number from private.invoice_series as series where series.month = $1 $$;

insert into private.invoice_series (month, last_number) values ('202601', 3);
select is(private.pass_number('INV-202601-00042'), 'invoice', 'a number of an invoice');
select is(pg_temp.last_invoice('202601'), 42, 'the series goes on after it');
select is(private.pass_number('inv-202601-00041'), 'invoice', 'a lower one');
select is(pg_temp.last_invoice('202601'), 42, 'takes it nowhere back');
select private.pass_number('INV-202602-00007');
select is(pg_temp.last_invoice('202602'), 7, 'also where the month had none');
select private.pass_number('INA-202602-00000');
select is(pg_temp.last_invoice('202602'), 100000, 'the series after the first');
select private.pass_number('INU-202602-99999');
select is(pg_temp.last_invoice('202602'), 2199999, 'and the last');
select is(private.pass_number('CRN-202601-00009'), 'credit_note', 'a number of a credit note');
select private.pass_number('CRB-202601-00001');
select is((select last_number from private.credit_note_series where month = '202601'), 200001, 'has its series too');
select is(
  array(select pg_temp.refused(format('select private.pass_number(%L)', told)) from unnest(array['INV-202601-00000', 'INV-2026-1', 'INZ-202601-00001', '']) as told),
  array['invalid_number', 'invalid_number', 'invalid_number', 'invalid_number'], 'what is no number of ours is refused'
);

select is(pg_temp.refused($$select private.begin_restore(now() + interval '1 day')$$), 'invalid_time', 'a backup is from before');
select private.begin_restore(now() - interval '1 hour');
select is(pg_temp.refused($$select private.begin_restore(now() - interval '1 hour')$$), 'restore_open', 'one at a time');
select is(
  (select dialling_enabled || ' ' || (reason like 'restored to %') from private.platform_dialling), 'false true', 'nobody is called, and whoever looks is told why'
);

select * from finish();
rollback;
