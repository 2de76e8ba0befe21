-- The store's half of the schema: names, values, walls and keys, as the CallAI document has them.
begin;
set local search_path = public, extensions, tap;
select plan(247);


-- The fourteen types, with exactly their values, in order.
select is(
  (select string_agg(label.enumlabel, ',' order by label.enumsortorder) from pg_catalog.pg_enum as label where label.enumtypid = ('public.' || v.type)::regtype),
  v.labels, format('%s has its values', v.type)
)
from (
  values
    ('store_platform', 'shopify,woocommerce,magento,bigcommerce,custom'),
    ('store_status', 'connected,disconnected,error,pending'),
    ('setting_category', 'voice,ai,integration,notification,security,general'),
    ('product_status', 'active,draft,archived,discontinued'),
    ('product_availability', 'in_stock,out_of_stock,low_stock,backorder,discontinued'),
    ('order_status', 'pending,confirmed,processing,shipped,delivered,cancelled,refunded,returned'),
    ('payment_status', 'pending,paid,partially_paid,refunded,partially_refunded,failed,cancelled'),
    ('fulfillment_status', 'unfulfilled,partial,fulfilled,restocked,cancelled'),
    ('call_direction', 'inbound,outbound'),
    ('call_status', 'initiated,ringing,answered,completed,failed,busy,no_answer,cancelled'),
    ('conversation_channel', 'voice,chat,email,sms,whatsapp'),
    ('conversation_status', 'active,paused,completed,escalated,abandoned,resolved'),
    ('message_role', 'customer,ai_assistant,human_agent,system'),
    ('message_type', 'text,audio,image,file,system_event,action_result')
) as v (type, labels);

-- Every table: there, described, walled, with both times.
create function pg_temp.tables() returns setof text
language sql as $$
  values ('stores'), ('settings'), ('store_phone_numbers'), ('user_settings'), ('customers'), ('customer_totals'), ('products'),
    ('product_images'), ('orders'), ('order_line_items'), ('conversations'), ('conversation_messages'), ('calls'), ('call_analytics'),
    ('properties'), ('property_reservations'), ('property_images'), ('property_features')
$$;
select has_table('public', name::name, format('there is %s', name)) from pg_temp.tables() as name;
select isnt(obj_description(('public.' || name)::regclass), null, format('%s is described', name)) from pg_temp.tables() as name;
select ok(class.relrowsecurity and class.relforcerowsecurity, format('%s has row level security, forced', name))
from pg_temp.tables() as name join pg_catalog.pg_class as class on class.oid = ('public.' || name)::regclass;
select is(
  (select count(*)::integer from pg_catalog.pg_policies where schemaname = 'public' and tablename = name and roles <> '{authenticated}'), 0,
  format('%s has policies for signed-in users alone', name)
)
from pg_temp.tables() as name;
select is(
  (
    select string_agg(privilege, ' ')
    from unnest(array['select', 'insert', 'update', 'delete', 'truncate', 'references', 'trigger']) as privilege
    where has_table_privilege('anon', ('public.' || name)::regclass, privilege)
      or privilege in ('select', 'insert', 'update') and has_any_column_privilege('anon', ('public.' || name)::regclass, privilege)
  ),
  null, format('a visitor has no right to %s', name)
)
from pg_temp.tables() as name;
select is(
  (
    select string_agg(privilege, ' ')
    from unnest(array['select', 'insert', 'update', 'delete', 'truncate', 'references', 'trigger']) as privilege
    where has_table_privilege('service_role', ('public.' || name)::regclass, privilege)
      or privilege in ('insert', 'update') and has_any_column_privilege('service_role', ('public.' || name)::regclass, privilege)
  ),
  'select', format('a handler reads %s and writes it through functions alone', name)
)
from pg_temp.tables() as name;
select col_not_null('public', name::name, 'organization_id', format('every row of %s has an organization', name)) from pg_temp.tables() as name;
select has_column('public', name::name, 'created_at', format('%s has created_at', name)) from pg_temp.tables() as name;
select has_trigger('public', name::name, 'update_modified_column', format('updated_at of %s follows', name))
from pg_temp.tables() as name where name <> 'property_features';
select ok(class.relrowsecurity and class.relforcerowsecurity, format('private.%s is walled off', name))
from unnest(array['store_credentials', 'user_credentials', 'setting_types']) as name
join pg_catalog.pg_class as class on class.oid = ('private.' || name)::regclass;
select is(
  (select count(*)::integer from unnest(array['anon', 'authenticated', 'service_role']) as role
   where has_any_column_privilege(role, ('private.' || name)::regclass, 'select')),
  0, format('nobody may ask for private.%s', name)
)
from unnest(array['store_credentials', 'user_credentials', 'setting_types']) as name;
select is(
  (
    select string_agg(attribute.attrelid::regclass || '.' || attribute.attname, ' ')
    from pg_catalog.pg_attribute as attribute
    join pg_catalog.pg_class as class on class.oid = attribute.attrelid and class.relkind = 'r'
    where class.relname in (select pg_temp.tables()) and class.relnamespace = 'public'::regnamespace
      and attribute.attname ~ '(access_token|refresh_token|auth_token|api_key|secret)' and attribute.attnum > 0
  ),
  null, 'no table that a client may ask for has a column for a secret'
);

-- Every foreign key between these tables carries the organization, and the store where there is one.
select is(
  (
    select string_agg(format('%s %s', fk.conrelid::regclass, fk.conname), ', ')
    from pg_catalog.pg_constraint as fk
    where fk.contype = 'f'
      and fk.conrelid in (select ('public.' || name)::regclass from pg_temp.tables() as name)
      and fk.confrelid not in ('public.organizations'::regclass, 'public.carrier_accounts'::regclass)
      and (
        select attribute.attname from pg_catalog.pg_attribute as attribute
        where attribute.attrelid = fk.conrelid and attribute.attnum = fk.conkey[1]
      ) <> 'organization_id'
  ),
  null, 'every foreign key starts with organization_id'
);
select is(
  (
    select string_agg(format('%s %s', fk.conrelid::regclass, fk.conname), ', ')
    from pg_catalog.pg_constraint as fk
    where fk.contype = 'f'
      and exists (select from pg_catalog.pg_attribute as a where a.attrelid = fk.conrelid and a.attname = 'store_id')
      and exists (select from pg_catalog.pg_attribute as a where a.attrelid = fk.confrelid and a.attname = 'store_id')
      and not exists (
        select from pg_catalog.pg_attribute as a
        where a.attrelid = fk.conrelid and a.attname = 'store_id' and a.attnum = any (fk.conkey)
      )
  ),
  null, 'a foreign key between two tables of a store carries store_id'
);
select is(
  (
    select string_agg(format('%s %s', fk.conrelid::regclass, fk.conname), ', ')
    from pg_catalog.pg_constraint as fk
    where fk.contype = 'f' and fk.confdeltype = 'n' and cardinality(fk.conkey) > 1 and coalesce(cardinality(fk.confdelsetcols), 0) <> 1
  ),
  null, 'on delete set null always names its column: an organization is never set to null'
);

-- The indexes of the CallAI document, by its names. Not made, because a unique constraint is the same or begins the same:
-- idx_customers_external_id, idx_products_external_id, idx_orders_external_id, idx_calls_twilio_call_sid, idx_conversations_key,
-- idx_messages_conversation_id, idx_messages_index, idx_messages_conversation_order, idx_settings_store_id, idx_settings_category,
-- idx_phone_numbers_store_id, idx_product_images_product_id, idx_order_line_items_order_id, idx_call_analytics_store_id,
-- idx_call_analytics_store_date, and the two of user_settings.
select has_index('public', v.table_name::name, index_name::name, format('there is %s', index_name))
from (
  values
    ('stores', array['idx_stores_domain', 'idx_stores_platform', 'idx_stores_status', 'idx_stores_created_at']),
    ('settings', array['idx_settings_key', 'idx_settings_category_key']),
    ('store_phone_numbers', array['idx_phone_numbers_active', 'idx_phone_numbers_primary']),
    ('customers', array['idx_customers_store_id', 'idx_customers_email', 'idx_customers_phone', 'idx_customers_last_order_date', 'idx_customers_tags']),
    ('products', array['idx_products_store_id', 'idx_products_sku', 'idx_products_status', 'idx_products_availability', 'idx_products_last_synced', 'idx_products_tags']),
    ('product_images', array['idx_product_images_position']),
    ('orders', array['idx_orders_store_id', 'idx_orders_customer_id', 'idx_orders_customer_email', 'idx_orders_customer_phone', 'idx_orders_status', 'idx_orders_payment_status', 'idx_orders_fulfillment_status', 'idx_orders_order_date', 'idx_orders_last_synced']),
    ('order_line_items', array['idx_order_line_items_product_id', 'idx_order_line_items_external_product_id', 'idx_order_line_items_sku']),
    ('calls', array['idx_calls_store_id', 'idx_calls_conversation_id', 'idx_calls_order_id', 'idx_calls_customer_id', 'idx_calls_direction', 'idx_calls_status', 'idx_calls_start_time', 'idx_calls_phone_numbers']),
    ('conversations', array['idx_conversations_store_id', 'idx_conversations_order_id', 'idx_conversations_customer_id', 'idx_conversations_channel', 'idx_conversations_status', 'idx_conversations_start_time', 'idx_conversations_last_activity', 'idx_conversations_customer_identifier', 'idx_conversations_tags']),
    ('conversation_messages', array['idx_messages_role', 'idx_messages_type', 'idx_messages_timestamp']),
    ('call_analytics', array['idx_call_analytics_date'])
) as v (table_name, names)
cross join unnest(v.names) as index_name;

-- Its triggers, by its names.
select has_trigger('public', v.table_name::name, v.trigger_name::name, format('there is %s', v.trigger_name))
from (
  values
    ('orders', 'update_customer_ltv_trigger'), ('conversation_messages', 'update_conversation_activity_trigger'),
    ('conversations', 'calculate_resolution_time_trigger'), ('calls', 'calculate_call_duration_trigger'),
    ('stores', 'create_default_settings_trigger')
) as v (table_name, trigger_name);

-- Every amount is an integer in minor units, and beside it there is a currency.
select is(
  (
    select string_agg(attribute.attrelid::regclass || '.' || attribute.attname, ' ')
    from pg_catalog.pg_attribute as attribute
    where attribute.attrelid in (select ('public.' || name)::regclass from pg_temp.tables() as name)
      and attribute.attname ~ '_minor$' and attribute.atttypid <> 'bigint'::regtype
  ),
  null, 'every amount is a bigint'
);
select is(
  (
    select string_agg(attribute.attrelid::regclass || '.' || attribute.attname, ' ')
    from pg_catalog.pg_attribute as attribute
    where attribute.attrelid in (select ('public.' || name)::regclass from pg_temp.tables() as name)
      and attribute.atttypid in ('real'::regtype, 'double precision'::regtype, 'money'::regtype) and attribute.attnum > 0
  ),
  null, 'there is no float'
);
select is(
  (
    select string_agg(distinct attribute.attrelid::regclass::text, ' ')
    from pg_catalog.pg_attribute as attribute
    where attribute.attrelid in (select ('public.' || name)::regclass from pg_temp.tables() as name)
      and attribute.attname ~ '_minor$'
      and not exists (
        select from pg_catalog.pg_attribute as other where other.attrelid = attribute.attrelid and other.attname = 'currency_code' and other.attnotnull
      )
  ),
  'order_line_items', 'an amount has its currency in its row; a line''s is its order''s'
);

-- What a screen watches.
select ok(
  exists (select from pg_catalog.pg_publication_tables where pubname = 'supabase_realtime' and schemaname = 'public' and tablename = 'conversations')
    or not exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime'),
  'conversations are watched live where there is Realtime'
);

select * from finish();
rollback;
