-- A release takes the oldest row of a class and priority by the index that is ordered so. Another that gave an order by time alone was
-- chosen in its place where few rows were of the class, and all the others were passed by one by one.
begin;
set local search_path = public, extensions, tap;
select plan(2);

set local enable_seqscan = off;
create function pg_temp.plan_of(query text) returns text
language plpgsql as $$
declare
  line text;
  lines text := '';
begin
  for line in execute 'explain ' || query loop
    lines := lines || line || E'\n';
  end loop;
  return lines;
end
$$;

select matches(
  pg_temp.plan_of(
    $$select id from public.call_queue where campaign_id = '00000000-0000-4000-a000-000000000001' and status = 'queued' and next_retry_at <= now()
      order by next_retry_at limit 5$$
  ),
  'Sort', 'No index of rows that wait is in the order of time alone'
);
set local enable_sort = off;
select matches(
  pg_temp.plan_of(
    $$select id from public.call_queue
      where campaign_id = '00000000-0000-4000-a000-000000000001' and status = 'queued' and dial_class = 1 and priority = 0 and next_retry_at <= now()
      order by next_retry_at limit 5$$
  ),
  'idx_call_queue_poll', 'The oldest of a class and priority is found by the index of the poll'
);
select * from finish();
rollback;
