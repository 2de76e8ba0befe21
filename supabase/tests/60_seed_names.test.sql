-- Every name of the two seed documents, and what their systems hold under it, as one list: what is missing is named.
-- "theirs>ours" is a column that is kept under another name, for a reason that is told beside it.
begin;
set local search_path = public, extensions, tap;
select plan(16);

create function pg_temp.missing_columns(list text[]) returns setof text
language sql as $$
  select split_part(entry, ':', 1) || '.' || split_part(name, '>', 1)
  from unnest(list) as entry
  cross join regexp_split_to_table(btrim(split_part(entry, ':', 2)), '\s+') as name
  where not exists (
    select
    from pg_catalog.pg_attribute as attribute
    where attribute.attrelid = to_regclass(
        case when split_part(name, '>', 2) ~ '\.' then regexp_replace(split_part(name, '>', 2), '\.[^.]*$', '')
        else 'public.' || split_part(entry, ':', 1) end
      )
      and attribute.attname = regexp_replace(coalesce(nullif(split_part(name, '>', 2), ''), name), '^.*\.', '')
      and attribute.attnum > 0 and not attribute.attisdropped
  )
$$;

-- CallAI. Tokens and keys are sealed and apart, so that no select can name them. Sums are per currency, and so in rows of their own.
-- Amounts are integers in the minor unit of a currency that stands beside them.
select is_empty($$select pg_temp.missing_columns(array[
  'stores: id name domain platform access_token>private.store_credentials.access_token_sealed '
    'refresh_token>private.store_credentials.refresh_token_sealed token_expires_at store_url currency_code timezone status last_sync_at '
    'sync_enabled owner_email owner_name created_at updated_at',
  'customers: id store_id external_id email phone first_name last_name accepts_marketing preferred_language '
    'total_spent>public.customer_totals.total_spent_minor total_orders lifetime_value>public.customer_totals.lifetime_value_minor '
    'last_order_date last_contact_date tags platform_data last_synced_at sync_hash created_at updated_at',
  'settings: id store_id category key value description is_encrypted is_required created_at updated_at',
  'store_phone_numbers: id store_id phone_number twilio_sid is_active is_primary voice_url voice_method created_at updated_at',
  'products: id store_id external_id external_variant_id title description handle product_type vendor tags price>price_minor '
    'compare_at_price>compare_at_price_minor cost_per_item>cost_per_item_minor currency_code sku barcode inventory_quantity inventory_tracked '
    'availability weight weight_unit seo_title seo_description platform_data status is_published published_at last_synced_at sync_hash '
    'created_at updated_at',
  'product_images: id product_id external_id url alt_text position created_at',
  'orders: id store_id customer_id external_id order_number customer_email customer_phone customer_first_name customer_last_name '
    'customer_external_id subtotal_price>subtotal_price_minor total_tax>total_tax_minor total_shipping>total_shipping_minor '
    'total_discounts>total_discounts_minor total_price>total_price_minor currency_code status payment_status fulfillment_status '
    'shipping_address billing_address shipping_method tracking_number tracking_url order_date shipped_date delivered_date cancelled_date '
    'platform_data customer_notes internal_notes last_synced_at sync_hash created_at updated_at',
  'order_line_items: id order_id product_id external_id external_product_id external_variant_id title variant_title sku price>price_minor '
    'quantity total_price>total_price_minor properties fulfillment_status fulfilled_quantity created_at updated_at',
  'conversations: id store_id conversation_key order_id customer_id channel status customer_identifier customer_name start_time end_time '
    'last_activity_at title summary primary_intent resolution_status ai_context conversation_history sentiment_score satisfaction_rating '
    'escalated_to_human resolution_time_seconds assigned_agent_id escalation_reason tags priority_level platform_data created_at updated_at',
  'calls: id store_id conversation_id twilio_call_sid call_id order_id customer_id from_phone to_phone direction start_time end_time '
    'duration_seconds status recording_url recording_sid transcript transcript_confidence ai_summary intent_detected sentiment_score '
    'satisfaction_rating quality_score dropped_call twilio_data ai_context created_at updated_at',
  'conversation_messages: id conversation_id message_index external_message_id role type content content_type attachments ai_model ai_prompt '
    'ai_metadata processed_at processing_time_ms intent entities sentiment_score platform_data timestamp created_at updated_at',
  'call_analytics: id store_id date_period hour_period total_calls inbound_calls outbound_calls answered_calls missed_calls dropped_calls '
    'average_call_duration average_quality_score average_satisfaction_rating ai_resolution_rate human_escalation_rate '
    'average_response_time_ms top_intents resolution_categories created_at updated_at',
  'user_settings: id user_id twilio_phone twilio_account_sid twilio_auth_token>private.user_credentials.twilio_auth_token_sealed '
    'openai_api_key>private.user_credentials.openai_api_key_sealed gemini_api_key>private.user_credentials.gemini_api_key_sealed '
    'elevenlabs_api_key>private.user_credentials.elevenlabs_api_key_sealed elevenlabs_voice_id created_at updated_at'
])$$, 'CallAI''s thirteen tables are here with every column');

-- Vantage. A plan's prices are versions, an invoice's amount is its total, and how it was paid is said by its payments.
select is_empty($$select pg_temp.missing_columns(array[
  'organizations: id name slug tier onboarding_status settings sector business_type company_name gstin address_line_1 address_line_2 city '
    'state country pincode contact_number caller_id created_at updated_at',
  'roles: id organization_id name description permissions is_system_default created_at',
  'profiles: id organization_id role_id system_role full_name email phone avatar_url metadata created_at updated_at',
  'projects: id organization_id name description address project_type status metadata image_url image_path created_by created_at updated_at',
  'pipelines: id organization_id name is_default created_at updated_at',
  'pipeline_stages: id pipeline_id project_id name order_index position color created_at updated_at',
  'leads: id organization_id project_id stage_id assigned_to name email phone source status score notes call_log_id call_status abuse_flag '
    'rejection_reason recording_consent last_contacted_at created_by created_at updated_at '
    'abuse_details waiting_status callback_time lead_source external_lead_id raw_data do_not_call opted_out_at opt_out_reason archived_at',
  'lead_activities: id organization_id lead_id type content created_by created_at',
  'lead_forms: id organization_id project_id name description fields is_active created_by created_at updated_at',
  'campaigns: id organization_id project_id name description status start_date end_date time_start time_end metadata created_by created_at '
    'updated_at ai_script call_settings auto_complete timezone paused_at completed_at total_enrolled total_calls answered_calls '
    'transferred_calls',
  'campaign_leads: campaign_id lead_id status enrolled_by enrolled_at last_call_attempt_at attempt_count call_log_id skip_reason opted_out_at '
    'opt_out_reason',
  'call_logs: id organization_id lead_id campaign_id project_id caller_id call_sid direction caller_number callee_number status call_status '
    'duration recording_url conversation_transcript ai_analysis notes metadata transferred transferred_at transfer_reason '
    'transfer_department disconnect_reason disconnect_notes ended_at created_at summary sentiment_score interest_level',
  'call_queue: id campaign_id lead_id organization_id status attempt_count max_attempts next_retry_at last_error created_at updated_at '
    'metadata priority',
  'properties: id organization_id project_id title description address price>price_minor size_sqft bedrooms bathrooms type status created_by '
    'created_at updated_at tower unit_number',
  'property_images: id property_id url is_featured order_index created_at',
  'property_features: id property_id feature_name created_at',
  'subscription_plans: id name slug description price_monthly>public.plan_prices.base_minor price_yearly>public.plan_prices.billing_cycle '
    'features is_active sort_order created_at updated_at',
  'subscriptions: id organization_id plan_id status billing_cycle current_period_start current_period_end cancel_at_period_end cancelled_at '
    'trial_ends_at metadata created_at updated_at',
  'payment_methods: id organization_id type last4 brand expiry_month expiry_year is_default gateway_customer_id gateway_payment_method_id '
    'metadata created_at',
  'invoices: id subscription_id organization_id amount>total_minor currency status invoice_number invoice_date due_date paid_at '
    'payment_method>public.payments.payment_method_id metadata created_at',
  'usage_logs: id organization_id feature_key usage_count period_start period_end metadata created_at',
  'audit_logs: id organization_id user_id user_name action entity_type entity_id metadata impersonator_user_id is_impersonated created_at',
  'impersonation_sessions: id admin_id target_user_id reason active created_at ended_at',
  'websocket_sessions: id user_id connection_id metadata created_at last_ping_at',
  'call_credits: organization_id balance>balance_minor total_purchased>total_purchased_minor total_consumed>total_consumed_minor '
    'low_balance_threshold>low_balance_minor',
  'credit_transactions: organization_id type amount>amount_minor balance_before>balance_before_minor balance_after>balance_after_minor '
    'reference_type reference_id description created_by',
  'stage_transitions: lead_id from_stage_id to_stage_id',
  'consents: lead_id phone_number scope proof granted_at expires_at revoked_at',
  'suppressions: organization_id phone_number source reason'
])$$, 'Vantage''s twenty-three tables are here with every column, and what its later versions made better');

-- What a type of theirs is called here, and its values: none is missing, a few are added.
select is_empty(
  $$select theirs, label
    from (values
      ('user_status', 'user_status', 'invited active suspended archived'),
      ('org_tier', 'org_tier', 'free pro enterprise'),
      ('system_role_enum', 'system_role', 'owner admin member platform_admin'),
      ('subscription_status', 'subscription_status', 'active cancelled past_due trialing inactive'),
      ('billing_cycle', 'billing_cycle', 'monthly yearly'),
      ('invoice_status', 'invoice_status', 'draft open paid void uncollectible'),
      ('payment_method_type', 'payment_method_type', 'card upi bank_transfer razorpay stripe'),
      ('queue_status', 'queue_status', 'queued processing completed failed'),
      ('campaigns.status', 'campaign_status', 'draft scheduled running paused completed cancelled archived failed'),
      ('campaign_leads.status', 'campaign_lead_status', 'enrolled queued calling called failed opted_out skipped archived'),
      ('store_platform', 'store_platform', 'shopify woocommerce magento bigcommerce custom'),
      ('store_status', 'store_status', 'connected disconnected error pending'),
      ('setting_category', 'setting_category', 'voice ai integration notification security general'),
      ('product_status', 'product_status', 'active draft archived discontinued'),
      ('product_availability', 'product_availability', 'in_stock out_of_stock low_stock backorder discontinued'),
      ('order_status', 'order_status', 'pending confirmed processing shipped delivered cancelled refunded returned'),
      ('payment_status', 'payment_status', 'pending paid partially_paid refunded partially_refunded failed cancelled'),
      ('fulfillment_status', 'fulfillment_status', 'unfulfilled partial fulfilled restocked cancelled'),
      ('call_direction', 'call_direction', 'inbound outbound'),
      ('call_status', 'call_status', 'initiated ringing answered completed failed busy no_answer cancelled'),
      ('conversation_channel', 'conversation_channel', 'voice chat email sms whatsapp'),
      ('conversation_status', 'conversation_status', 'active paused completed escalated abandoned resolved'),
      ('message_role', 'message_role', 'customer ai_assistant human_agent system'),
      ('message_type', 'message_type', 'text audio image file system_event action_result')
    ) as type (theirs, ours, labels)
    cross join regexp_split_to_table(labels, ' ') as label
    where not exists (
      select from pg_catalog.pg_enum as known where known.enumtypid = to_regtype('public.' || type.ours) and known.enumlabel = label
    )$$,
  'Every type has every value'
);
select is_empty(
  $$select name from unnest(array['apartment', 'villa', 'plot', 'commercial', 'available', 'sold', 'reserved', 'rented']) as name
    where not exists (
      select from pg_catalog.pg_constraint as rule
      where rule.conrelid = 'public.properties'::regclass and rule.contype = 'c' and pg_get_constraintdef(rule.oid) like '%''' || name || '''%'
    )$$,
  'A property has the types and states of the document'
);

-- Indexes, by their names; beside a name of theirs is what covers it here, where that is another one.
select is_empty(
  $$select name
    from unnest(array[
      'idx_stores_domain', 'idx_stores_platform', 'idx_stores_status', 'idx_stores_created_at', 'idx_settings_key', 'idx_settings_category_key',
      'idx_phone_numbers_active', 'idx_phone_numbers_primary', 'idx_customers_store_id', 'idx_customers_email', 'idx_customers_phone',
      'idx_customers_last_order_date', 'idx_customers_tags', 'idx_products_store_id', 'idx_products_sku', 'idx_products_status',
      'idx_products_availability', 'idx_products_last_synced', 'idx_products_tags', 'idx_product_images_position', 'idx_orders_store_id',
      'idx_orders_customer_id', 'idx_orders_customer_email', 'idx_orders_customer_phone', 'idx_orders_status', 'idx_orders_payment_status',
      'idx_orders_fulfillment_status', 'idx_orders_order_date', 'idx_orders_last_synced', 'idx_order_line_items_product_id',
      'idx_order_line_items_external_product_id', 'idx_order_line_items_sku', 'idx_calls_store_id', 'idx_calls_conversation_id',
      'idx_calls_order_id', 'idx_calls_customer_id', 'idx_calls_direction', 'idx_calls_status', 'idx_calls_start_time', 'idx_calls_phone_numbers',
      'idx_conversations_store_id', 'idx_conversations_order_id', 'idx_conversations_customer_id', 'idx_conversations_channel',
      'idx_conversations_status', 'idx_conversations_start_time', 'idx_conversations_last_activity', 'idx_conversations_customer_identifier',
      'idx_conversations_tags', 'idx_messages_role', 'idx_messages_type', 'idx_messages_timestamp', 'idx_call_analytics_date',
      'idx_call_logs_organization_id', 'idx_call_logs_campaign_id', 'idx_call_logs_lead_id', 'idx_call_queue_poll', 'idx_subscriptions_org_id',
      'idx_payment_methods_org_id', 'idx_usage_logs_org_period', 'idx_invoices_status'
    ]) as name
    where not exists (
      select from pg_catalog.pg_index as index
      where index.indexrelid = to_regclass('public.' || name) and index.indisvalid
    )$$,
  'Every index that is kept has its name'
);
select is_empty(
  $$select theirs, on_table, columns
    from (values
      ('idx_settings_store_id', 'settings', 'organization_id store_id'), ('idx_settings_category', 'settings', 'organization_id category'),
      ('idx_phone_numbers_store_id', 'store_phone_numbers', 'organization_id store_id'),
      ('idx_customers_external_id', 'customers', 'organization_id store_id external_id'),
      ('idx_products_external_id', 'products', 'organization_id store_id external_id'),
      ('idx_product_images_product_id', 'product_images', 'organization_id store_id product_id'),
      ('idx_orders_external_id', 'orders', 'organization_id store_id external_id'),
      ('idx_order_line_items_order_id', 'order_line_items', 'organization_id store_id order_id'),
      ('idx_calls_twilio_call_sid', 'calls', 'organization_id twilio_call_sid'),
      ('idx_conversations_key', 'conversations', 'organization_id store_id conversation_key'),
      ('idx_messages_conversation_id', 'conversation_messages', 'organization_id store_id conversation_id'),
      ('idx_messages_index', 'conversation_messages', 'organization_id conversation_id message_index'),
      ('idx_messages_conversation_order', 'conversation_messages', 'organization_id conversation_id message_index'),
      ('idx_call_analytics_store_id', 'call_analytics', 'organization_id store_id'),
      ('idx_call_analytics_store_date', 'call_analytics', 'organization_id store_id date_period'),
      ('idx_user_settings_user_id', 'user_settings', 'user_id'),
      ('idx_call_logs_call_sid', 'call_logs', 'call_sid'), ('idx_call_logs_created_at', 'call_logs', 'organization_id created_at'),
      ('idx_call_queue_campaign', 'call_queue', 'campaign_id'), ('idx_subscriptions_status', 'subscriptions', 'trial_ends_at'),
      ('idx_invoices_org_id', 'invoices', 'organization_id')
    ) as covered (theirs, on_table, columns)
    where not exists (
      select
      from pg_catalog.pg_index as index
      where index.indrelid = ('public.' || on_table)::regclass and index.indisvalid
        and (
          select string_agg(attribute.attname, ' ' order by key.place)
          from unnest(index.indkey::smallint[]) with ordinality as key (number, place)
          join pg_catalog.pg_attribute as attribute on attribute.attrelid = index.indrelid and attribute.attnum = key.number
        ) || ' ' like columns || ' %'
    )$$,
  'What another index covers is covered'
);

-- Functions. What a user calls is in public, what a trigger calls is in private.
select is_empty(
  $$select name from unnest(array[
      'public.get_auth_org_id()', 'public.get_auth_system_role()', 'public.get_auth_role_id()', 'public.auth_has_permission(text)',
      'public.get_org_subscription()', 'public.check_feature_quota(text,bigint)', 'public.auto_complete_inactive_conversations(jsonb)',
      'private.update_modified_column()', 'private.handle_new_user()', 'private.set_invoice_number()', 'private.update_customer_lifetime_value()',
      'private.update_conversation_activity()', 'private.calculate_resolution_time()', 'private.calculate_call_duration()',
      'private.create_default_settings()', 'private.create_default_pipeline(uuid)'
    ]) as name
    where to_regprocedure(name) is null$$,
  'Every helper and trigger function is here'
);
select is_empty(
  $$select on_table, name from (values
      ('public.orders', 'update_customer_ltv_trigger'), ('public.conversation_messages', 'update_conversation_activity_trigger'),
      ('public.conversations', 'calculate_resolution_time_trigger'), ('public.calls', 'calculate_call_duration_trigger'),
      ('public.stores', 'create_default_settings_trigger'), ('auth.users', 'on_auth_user_created'), ('public.invoices', 'set_invoice_number_trigger')
    ) as wanted (on_table, name)
    where not exists (
      select from pg_catalog.pg_trigger as trigger
      where trigger.tgrelid = wanted.on_table::regclass and trigger.tgname = wanted.name and trigger.tgenabled <> 'D'
    )$$,
  'Every trigger is here, by its name, and on'
);

-- What the systems start with.
select results_eq(
  $$select plan.slug::text, price.billing_cycle::text, price.base_minor, price.currency::text
    from public.subscription_plans as plan join public.plan_prices as price on price.plan_id = plan.id
    where plan.slug in ('free', 'pro', 'enterprise') and price.version = 1 order by plan.sort_order, price.billing_cycle$$,
  $$values ('free', 'monthly', 0::bigint, 'INR'), ('pro', 'monthly', 999900, 'INR'), ('pro', 'yearly', 9999000, 'INR'),
      ('enterprise', 'monthly', 0, 'INR'), ('enterprise', 'yearly', 0, 'INR')$$,
  'Three plans with their prices, in paise'
);
select results_eq(
  $$select slug::text, trial_days, features ->> 'max_users', features ->> 'max_projects', features ->> 'max_campaigns',
      features ->> 'ai_calls_per_month', features ->> 'max_leads', features ->> 'support'
    from public.subscription_plans where slug in ('free', 'pro', 'enterprise') order by sort_order$$,
  $$values ('free', 14, '3', '2', '5', '50', '500', 'community'), ('pro', 14, '10', '10', '50', '5000', '10000', 'email'),
      ('enterprise', 14, '-1', '-1', '-1', '-1', '-1', 'priority')$$,
  'with their limits and fourteen days to try'
);
select is_empty(
  $$select slug, feature from (values
      ('pro', 'custom_branding'), ('pro', 'advanced_analytics'), ('enterprise', 'custom_pricing'), ('enterprise', 'dedicated_account_manager'),
      ('enterprise', 'sla'), ('enterprise', 'custom_integrations')
    ) as wanted (slug, feature)
    where not coalesce((select (plan.features ->> feature)::boolean from public.subscription_plans as plan where plan.slug = wanted.slug), false)$$,
  'and what is switched on'
);
select is((select count(*) from private.setting_types), 12::bigint, 'A new store has twelve settings');

insert into auth.users (id, email) values ('00000000-0000-4000-8000-0000000f0001', 'first@names.test');
set local request.jwt.claims = '{"sub": "00000000-0000-4000-8000-0000000f0001", "role": "authenticated"}';
select public.create_organization('Names');
select is(
  (select string_agg(format('%s %s %s', stage.order_index, stage.name, stage.color), ', ' order by stage.order_index)
   from public.pipeline_stages as stage join public.pipelines as pipeline on pipeline.id = stage.pipeline_id
   where pipeline.name = 'Default Pipeline' and pipeline.is_default),
  '0 New Lead #3b82f6, 1 Contacted #eab308, 2 Qualified #22c55e, 3 Negotiation #a855f7, 4 Won #15803d, 5 Lost #ef4444',
  'A new organization has the default pipeline, its six stages and their colours'
);
select is(
  (select string_agg(key, ' ' order by key) from public.permissions),
  'audit.view billing.manage billing.view call.control call.listen call.view campaign.edit campaign.run campaign.view lead.delete lead.edit '
  'lead.import lead.view member.manage organization.manage project.create project.edit property.edit property.view role.manage store.edit '
  'store.view usage.view webhook.manage',
  'Every permission is a row'
);
select is(
  (select string_agg(key, ' ' order by key) from public.permissions where not admin)
    || '; ' || (select string_agg(key, ' ' order by key) from public.permissions where member),
  'organization.manage; audit.view billing.view call.view campaign.view lead.edit lead.view property.view store.view usage.view',
  'An admin holds all but the organization itself, a member the views and lead.edit'
);
-- What the systems have and nobody should: statements as an argument, floats for money.
select is_empty(
  $$select routine.oid::regprocedure::text from pg_catalog.pg_proc as routine
    where routine.pronamespace in ('public'::regnamespace, 'private'::regnamespace) and routine.proname ~ '(exec|run|query)_?(sql|query)'
    union all
    select attribute.attrelid::regclass::text || '.' || attribute.attname
    from pg_catalog.pg_attribute as attribute
    join pg_catalog.pg_class as class on class.oid = attribute.attrelid and class.relkind in ('r', 'p')
    where class.relnamespace in ('public'::regnamespace, 'private'::regnamespace) and attribute.attnum > 0
      and attribute.atttypid in ('real'::regtype, 'double precision'::regtype, 'money'::regtype)$$,
  'No function takes a statement to run, and no column is a float'
);

select * from finish();
rollback;
