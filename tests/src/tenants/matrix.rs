//! Who may do what with their own organization's rows: the expectation, table by table and function by function.

use Right::{Everyone, Members, Nobody, With};

/// Who may do one kind of thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// No user at all.
    Nobody,
    /// Every active member of the organization, whatever their role.
    Members,
    /// Members who hold all of these permissions.
    With(&'static [&'static str]),
    /// Whoever is signed in: reference data.
    Everyone,
    /// Whoever is signed in and belongs to no organization yet.
    Strangers,
    /// The operator's own staff.
    Staff,
}

/// One table.
#[derive(Debug, Clone, Copy)]
pub struct Wall {
    /// Its name in `public`.
    pub table: &'static str,
    /// Who reads the organization's rows.
    pub see: Right,
    /// Who adds one.
    pub insert: Right,
    /// Who changes one.
    pub change: Right,
    /// Who removes one.
    pub remove: Right,
    /// For reference data: the rows that the first organization alone may see, if there are any.
    pub hidden: Option<&'static str>,
    /// Which of the organization's own rows this user sees (`{me}` is the user), if not all.
    pub seen: &'static str,
    /// Which of them this user may change.
    pub changeable: &'static str,
    /// The rows that are in the way of a new one, for a table that has one row a user.
    pub in_the_way: Option<&'static str>,
}

const fn wall(table: &'static str, see: Right, insert: Right, change: Right, remove: Right) -> Wall {
    Wall { table, see, insert, change, remove, hidden: None, seen: "true", changeable: "true", in_the_way: None }
}

const fn reading(table: &'static str, see: Right) -> Wall {
    wall(table, see, Nobody, Nobody, Nobody)
}

const fn reference(table: &'static str, hidden: Option<&'static str>) -> Wall {
    Wall { hidden, ..reading(table, Everyone) }
}

const AUDIT: Right = With(&["audit.view"]);
const BILLING: Right = With(&["billing.view"]);
const CALLS: Right = With(&["call.view"]);
const CAMPAIGNS: Right = With(&["campaign.view"]);
const LEADS: Right = With(&["lead.view"]);
const EDIT_LEADS: Right = With(&["lead.edit"]);
const EDIT_PROJECTS: Right = With(&["project.edit"]);
const MANAGE_ORGANIZATION: Right = With(&["organization.manage"]);
const MANAGE_ROLES: Right = With(&["role.manage"]);
const STORES: Right = With(&["store.view"]);
const EDIT_STORES: Right = With(&["store.edit"]);
const PROPERTIES: Right = With(&["property.view"]);
const EDIT_PROPERTIES: Right = With(&["property.edit"]);
const WEBHOOKS: Right = With(&["webhook.manage"]);
const USAGE: Right = With(&["usage.view"]);

/// Every table that there is or is about to be. One without a line here fails the test.
///
/// Columns: table, see, insert, change, remove.
#[rustfmt::skip]
pub const WALLS: &[Wall] = &[
    // The organization and its people.
    wall("organizations",   Members,             Nobody,                      MANAGE_ORGANIZATION, Nobody),
    Wall { changeable: "id = '{me}'", ..wall("profiles", Members, Nobody, Members, Nobody) },
    wall("roles",           Members,             MANAGE_ROLES,                MANAGE_ROLES,        MANAGE_ROLES),
    reading("api_keys",     MANAGE_ORGANIZATION),
    reading("invitations",  With(&["member.manage"])),
    reading("audit_logs",   AUDIT),
    reading("webhook_endpoints", WEBHOOKS),
    reading("event_deliveries",  WEBHOOKS),
    reading("impersonation_sessions", AUDIT),
    reading("webhook_sources", WEBHOOKS),
    Wall { seen: "user_id = '{me}'", changeable: "user_id = '{me}'", in_the_way: Some("true"), ..wall("user_settings", Members, Members, Members, Members) },
    Wall { seen: "kind = 'agent'", ..reading("websocket_sessions", CALLS) },
    // Leads.
    wall("projects",        Members,             With(&["project.create"]),   EDIT_PROJECTS,       Nobody),
    wall("pipelines",       Members,             EDIT_PROJECTS,               EDIT_PROJECTS,       EDIT_PROJECTS),
    wall("pipeline_stages", Members,             EDIT_PROJECTS,               EDIT_PROJECTS,       EDIT_PROJECTS),
    reading("stage_transitions", LEADS),
    wall("lead_forms",      LEADS,               EDIT_PROJECTS,               EDIT_PROJECTS,       EDIT_PROJECTS),
    wall("leads",           LEADS,               EDIT_LEADS,                  EDIT_LEADS,          With(&["lead.delete"])),
    wall("lead_activities", LEADS,               EDIT_LEADS,                  Nobody,              Nobody),
    wall("suppressions",    LEADS,               EDIT_LEADS,                  Nobody,              Nobody),
    wall("consents",        LEADS,               EDIT_LEADS,                  Nobody,              Nobody),
    // Properties.
    wall("properties",        PROPERTIES,        EDIT_PROPERTIES,             EDIT_PROPERTIES,     EDIT_PROPERTIES),
    wall("property_features", PROPERTIES,        EDIT_PROPERTIES,             Nobody,              EDIT_PROPERTIES),
    wall("property_images",   PROPERTIES,        EDIT_PROPERTIES,             EDIT_PROPERTIES,     EDIT_PROPERTIES),
    reading("property_reservations", PROPERTIES),
    // Campaigns and calls.
    wall("campaigns",       CAMPAIGNS,           With(&["campaign.edit"]),    With(&["campaign.edit"]), Nobody),
    reading("campaign_leads", CAMPAIGNS),
    reading("call_queue",     CAMPAIGNS),
    reading("caller_numbers", CAMPAIGNS),
    reading("carrier_accounts", Nobody),
    wall("call_logs",       CALLS,               Nobody,                      With(&["call.control"]), Nobody),
    // Stores.
    wall("stores",          STORES,              EDIT_STORES,                 EDIT_STORES,         EDIT_STORES),
    wall("store_phone_numbers", STORES,          Nobody,                      EDIT_STORES,         Nobody),
    wall("settings",        STORES,              EDIT_STORES,                 EDIT_STORES,         EDIT_STORES),
    wall("products",        STORES,              EDIT_STORES,                 EDIT_STORES,         EDIT_STORES),
    wall("product_images",  STORES,              EDIT_STORES,                 EDIT_STORES,         EDIT_STORES),
    wall("customers",       STORES,              EDIT_STORES,                 EDIT_STORES,         Nobody),
    reading("customer_totals", STORES),
    wall("orders",          STORES,              EDIT_STORES,                 EDIT_STORES,         Nobody),
    wall("order_line_items", STORES,             EDIT_STORES,                 EDIT_STORES,         Nobody),
    reading("privacy_requests", STORES),
    wall("conversations",   STORES,              Nobody,                      EDIT_STORES,         Nobody),
    reading("conversation_messages", STORES),
    wall("calls",           With(&["store.view", "call.view"]), Nobody,       With(&["store.edit", "store.view", "call.view"]), Nobody),
    reading("call_analytics", STORES),
    // Usage and money.
    reading("usage_logs",    USAGE),
    reading("usage_days",    USAGE),
    reading("subscriptions", BILLING),
    Wall { seen: "status <> 'draft'", ..reading("invoices", BILLING) },
    reading("invoice_lines", BILLING),
    reading("invoice_taxes", BILLING),
    Wall { seen: "status <> 'draft'", ..reading("credit_notes", BILLING) },
    reading("credit_note_lines", BILLING),
    reading("credit_note_taxes", BILLING),
    reading("payments", BILLING),
    reading("payment_methods", BILLING),
    reading("refunds", BILLING),
    reading("call_credits", BILLING),
    reading("credit_accounts", BILLING),
    reading("credit_ledger", BILLING),
    reading("credit_transactions", BILLING),
    reading("call_charges", BILLING),
    // Reference data, with the rows of it that are one customer's own.
    reference("permissions", None),
    reference("tax_rates", None),
    reference("calling_hours", None),
    reference("calling_holidays", None),
    reference("meters", Some("not is_active")),
    reference("subscription_plans", Some("slug = 'isolation-first'")),
    reference("plan_prices", Some("base_minor = 987654321")),
    reference("plan_price_meters", Some("limit_units = 987654321")),
    Wall { see: Nobody, ..reference("platform_audit_logs", Some("true")) },
];

/// Policies whose expression is `true` because what they show is everybody's.
pub const OPEN_BY_INTENT: &[&str] = &["permissions", "tax_rates", "calling_hours", "calling_holidays"];

/// One function that users call, with what makes it succeed for whoever has the right.
#[derive(Debug, Clone, Copy)]
pub struct Use {
    /// Its name in `public`.
    pub name: &'static str,
    /// Who may.
    pub right: Right,
    /// The arguments. `{me}` is the caller, `{org}` their organization, `{member}` and `{peer}` two of its people, `{leads}` the id of a row of
    /// its `leads`, and so on: whoever may calls it with each row.
    pub arguments: &'static str,
    /// What has to be so before, done by the database's owner.
    pub first: &'static str,
    /// Who is turned away with another code than `permission_denied`, or `no_organization` for whoever is in none: a part of the
    /// persona's name, and the code.
    pub refused: &'static [(&'static str, &'static str)],
}

const fn call(name: &'static str, right: Right, arguments: &'static str) -> Use {
    Use { name, right, arguments, first: "", refused: &[] }
}

const fn after(first: &'static str, function: Use) -> Use {
    Use { first, ..function }
}

const fn refusing(refused: &'static [(&'static str, &'static str)], function: Use) -> Use {
    Use { refused, ..function }
}

const MANAGE_BILLING: Right = With(&["billing.manage"]);
const MANAGE_MEMBERS: Right = With(&["member.manage"]);
const RUN: Right = With(&["campaign.run"]);
const NOT_HELD: &str =
    "update public.property_reservations set status = 'released', ended_at = now() where organization_id = '{org}'";
const ROOM: &str = "update public.subscriptions set metadata = '{\"custom_limits\": {\"max_users\": -1}}' where organization_id = '{org}'";
const A_DRAFT: &str = "set local session_replication_role = replica;
    delete from public.call_queue where organization_id = '{org}';
    delete from public.campaign_leads where organization_id = '{org}';
    update public.campaigns set project_id = null, status = 'draft', open_leads = 0, total_enrolled = 0 where organization_id = '{org}';
    set local session_replication_role = origin";
const A_DRAFT_TO_COME: &str = "set local session_replication_role = replica;
    delete from public.call_queue where organization_id = '{org}';
    delete from public.campaign_leads where organization_id = '{org}';
    update public.campaigns
    set project_id = null, status = 'draft', open_leads = 0, total_enrolled = 0, start_date = current_date + 30, end_date = null
    where organization_id = '{org}';
    set local session_replication_role = origin";
const RUNNING: &str = "set local session_replication_role = replica;
    update public.campaigns set status = 'running', open_leads = 100 where organization_id = '{org}';
    set local session_replication_role = origin";
const COMPLETED: &str = "set local session_replication_role = replica;
    update public.campaigns set status = 'completed' where organization_id = '{org}';
    set local session_replication_role = origin";
const ARCHIVED: &str = "set local session_replication_role = replica;
    update public.campaigns set status = 'archived' where organization_id = '{org}';
    set local session_replication_role = origin";
const PAUSED: &str = "set local session_replication_role = replica;
    update public.campaigns set status = 'paused', open_leads = 100 where organization_id = '{org}';
    set local session_replication_role = origin";
const A_QUIET_LINE: &str = "set local session_replication_role = replica;
    update private.clock_offset set shift = timestamptz '2026-11-24 12:00+05:30' - now();
    insert into private.clock_offset (shift) values (timestamptz '2026-11-24 12:00+05:30' - now()) on conflict do nothing;
    delete from public.suppressions where organization_id = '{org}';
    update public.carrier_accounts set is_active = true, dialling_enabled = true, max_concurrent_calls = 1000;
    update public.caller_numbers set is_active = true where organization_id = '{org}';
    update public.organizations set dialling_enabled = true, max_concurrent_calls = 1000, dial_countries = null where id = '{org}';
    update public.campaigns
    set status = 'draft', start_date = null, end_date = null, max_concurrent_calls = 1000, timezone = 'Asia/Kolkata'
    where organization_id = '{org}';
    update public.leads
    set phone = '+917111111111', timezone = null, do_not_call = false, abuse_flag = false, archived_at = null
    where id = '{leads}';
    set local session_replication_role = origin";
const A_FAILED_CALL: &str = "set local session_replication_role = replica;
    delete from public.suppressions where organization_id = '{org}';
    update public.leads set do_not_call = false where organization_id = '{org}';
    update public.campaigns set status = 'running', open_leads = 100 where organization_id = '{org}';
    update public.call_queue set status = 'failed' where organization_id = '{org}';
    update public.call_logs
    set attempt_no = 99, queue_id = (select queue.id from public.call_queue as queue where queue.organization_id = '{org}' limit 1)
    where id = '{call_logs}';
    set local session_replication_role = origin";
const AN_EVENT: &str = "insert into private.webhook_events
      (id, received_at, organization_id, source, source_id, dedupe_key, kind, payload_type, status)
    values ('e0e0e0e0-0000-4000-8000-000000000001', now(), '{org}', 'agent', 'isolation', 'isolation', 'isolation', 'nothing', 'ignored')";
const A_RECORDING: &str = "insert into private.recordings
      (organization_id, attempt_id, state, next_try_at, path, bytes, content_type, created_at)
    values ('{org}', '{call_logs}', 'copied', null, 'isolation', 1, 'audio/mpeg', now())
    on conflict (attempt_id) do update
    set state = 'copied', next_try_at = null, path = excluded.path, bytes = 1, content_type = excluded.content_type";
const UNDER_WAY: &str = "set local session_replication_role = replica;
    update public.call_logs set status = 'in_progress', call_status = null, ended_at = null, dialled = true, submitted_at = now(), begun_at = now(),
        call_sid = coalesce(call_sid, id::text) where organization_id = '{org}';
    set local session_replication_role = origin";
const ANOTHER_OWNER: &str = "update public.profiles set system_role = 'owner'
    where id = '{peer}' and id <> '{me}'";
const LISTENING: &str = "set local session_replication_role = replica;
    update public.webhook_endpoints set enabled = true, disabled_reason = null, disabled_at = null where organization_id = '{org}';
    insert into private.outbox (id, organization_id, topic, key, payload, created_at, dispatched_at)
    select event_id, '{org}', 'call.ended', id::text, jsonb_build_object('call_id', id), now(), now() from public.event_deliveries where organization_id = '{org}'
    on conflict do nothing;
    update public.event_deliveries set endpoint_id = (select min(id::text)::uuid from public.webhook_endpoints where organization_id = '{org}')
    where id = (select min(id::text)::uuid from public.event_deliveries where organization_id = '{org}');
    set local session_replication_role = origin";
const AN_ISSUER: &str =
    "insert into private.billing_issuer (legal_name, country_code, timezone) values ('Issuer', 'IN', 'Asia/Kolkata')
    on conflict do nothing";
const PLANS_TO_CHANGE: &str =
    "insert into private.billing_issuer (legal_name, country_code, timezone) values ('Issuer', 'IN', 'Asia/Kolkata')
    on conflict do nothing;
    insert into public.subscription_plans (slug, name) values ('isolation-other', 'Other') on conflict do nothing;
    insert into public.plan_prices (plan_id, version, base_minor)
    select id, 1, 1 from public.subscription_plans where slug = 'isolation-other' on conflict do nothing;
    insert into private.coupons (code, name, percent_bp, valid_from, created_at)
    values ('ISOLATION', 'Coupon', 1000, '2020-01-01', '2020-01-01') on conflict do nothing;
    set local session_replication_role = replica;
    update public.subscriptions set next_invoice_at = current_period_end, billing_hold = null, cancel_at_period_end = false
    where organization_id = '{org}' and status = 'active';
    update public.invoices set past_due_at = null where organization_id = '{org}';
    set local session_replication_role = origin";
const OWED: &str = "insert into private.payment_accounts (gateway, credentials_sealed, api_base, return_url)
    values ('stripe', 'v1.1.x', 'https://api.stripe.com', 'https://example.com') on conflict do nothing;
    set local session_replication_role = replica;
    update public.invoices set status = 'open', subtotal_minor = 100, total_minor = 100, amount_paid_minor = 0, credited_minor = 0, currency = 'INR'
    where organization_id = '{org}' and id = '{invoices}';
    update public.payment_methods set is_default = false where organization_id = '{org}';
    update public.payment_methods set is_default = true, removed_at = null, gateway = 'stripe', type = 'stripe', gateway_customer_id = 'cus_x',
      expiry_month = null, expiry_year = null
    where organization_id = '{org}' and id = '{payment_methods}';
    set local session_replication_role = origin";
const A_COUNTED_LINE: &str = "set local session_replication_role = replica;
    delete from public.invoice_lines where organization_id = '{org}' and invoice_id = '{invoices}';
    insert into public.invoice_lines (organization_id, invoice_id, position, kind, meter_key, description, quantity, unit, unit_price_minor, amount_minor)
    values ('{org}', '{invoices}', 1, 'included', 'ai_calls', 'Calls', 1, 'call', 0, 0);
    set local session_replication_role = origin";
const INVITED: &str = "update auth.users set email_confirmed_at = now() where id = '{me}';
    insert into public.invitations (organization_id, organization_name, email, token_sha256, expires_at)
    values ('{org}', 'Second', coalesce((select lower(email) from auth.users where id = '{me}'), 'nobody@example.com'),
      extensions.digest('isolation', 'sha256'), now() + interval '1 day')";

/// What a user's functions ask for. One that users may call and that has no line here fails the test; `anon` calls none.
#[rustfmt::skip]
pub const FUNCTIONS: &[Use] = &[
    call("get_auth_org_id",       Everyone, ""),
    call("get_auth_system_role",  Everyone, ""),
    call("get_auth_role_id",      Everyone, ""),
    call("auth_has_permission",   Everyone, "'lead.view'"),
    call("check_feature_quota",   Everyone, "'max_users', 0"),
    refusing(&[("suspended", "no_profile"), ("invited", "no_profile"), ("gone", "no_profile"), ("staff", "platform_admin"), ("", "already_in_organization")],
        call("create_organization", Right::Strangers, "'isolation-new'")),
    refusing(&[("", "already_in_organization")],
        after(INVITED, call("accept_invitation", Right::Strangers, "'isolation'"))),
    refusing(&[("suspended", "suspended"), ("invited", "suspended"), ("gone", "unauthenticated")],
        after(ANOTHER_OWNER, call("leave_organization", Members, ""))),
    call("create_api_key",        MANAGE_ORGANIZATION, "'isolation', array['usage.write']"),
    call("set_member_role",       MANAGE_MEMBERS, "'{member}', 'member'"),
    call("set_member_status",     MANAGE_MEMBERS, "'{member}', 'suspended'"),
    call("remove_member",         MANAGE_MEMBERS, "'{member}'"),
    after(ROOM, call("create_invitation", MANAGE_MEMBERS, "'isolation-new@example.com'")),
    call("revoke_invitation",     MANAGE_MEMBERS, "'{invitations}'"),
    call("move_stage",            EDIT_PROJECTS, "'{pipeline_stages}', 0"),
    call("revoke_consent",        EDIT_LEADS, "'{consents}', 'asked'"),
    after(NOT_HELD, call("reserve_property", EDIT_PROPERTIES, "'{properties}', '{leads}'")),
    after(NOT_HELD, call("set_property_status", EDIT_PROPERTIES, "'{properties}', 'rented'")),
    call("order_property_images", EDIT_PROPERTIES, "'{properties}', '{}'::uuid[]"),
    refusing(&[("gone", "unauthenticated"), ("", "permission_denied")],
        call("start_impersonation", Right::Staff, "'{member}', 'A long enough reason', 5")),
    call("end_impersonation",     Everyone, ""),
    call("get_campaign",          CAMPAIGNS, "'{campaigns}'"),
    call("create_campaign",       With(&["campaign.edit"]), "'isolation'"),
    after(A_DRAFT, call("start_campaign",  RUN, "'{campaigns}'")),
    after(A_DRAFT_TO_COME, call("schedule_campaign", RUN, "'{campaigns}'")),
    after(RUNNING, call("pause_campaign",  RUN, "'{campaigns}'")),
    after(PAUSED,  call("resume_campaign", RUN, "'{campaigns}'")),
    after(RUNNING, call("cancel_campaign", RUN, "'{campaigns}'")),
    call("create_webhook_endpoint", WEBHOOKS, "gen_random_uuid(), 'https://hooks.example.com/', 'sealed'"),
    after(LISTENING, call("update_webhook_endpoint", WEBHOOKS, "'{webhook_endpoints}', 'https://hooks.example.com/'")),
    after(LISTENING, call("rotate_webhook_secret",   WEBHOOKS, "'{webhook_endpoints}', 'sealed'")),
    after(LISTENING, call("set_webhook_endpoint",    WEBHOOKS, "'{webhook_endpoints}', false")),
    after(LISTENING, call("test_webhook_endpoint",   WEBHOOKS, "'{webhook_endpoints}'")),
    after(LISTENING, call("get_event_delivery",      WEBHOOKS, "'{event_deliveries}'")),
    after(LISTENING, call("replay_delivery",         WEBHOOKS, "'{event_deliveries}'")),
    after(LISTENING, call("replay_deliveries",       WEBHOOKS, "'{webhook_endpoints}', now() - interval '1 day'")),
    after(LISTENING, call("delete_webhook_endpoint", WEBHOOKS, "'{webhook_endpoints}'")),
    after(RUNNING, call("complete_campaign", RUN, "'{campaigns}'")),
    after(COMPLETED, call("archive_campaign", RUN, "'{campaigns}'")),
    after(ARCHIVED, call("restore_campaign", RUN, "'{campaigns}'")),
    after(A_DRAFT, call("preview_campaign", RUN, "'{campaigns}'")),
    call("get_dial_evidence",     With(&["call.view"]), "'+917000000001'"),
    call("get_usage",             USAGE, ""),
    call("get_usage_daily",       USAGE, ""),
    call("get_usage_overview",    USAGE, ""),
    call("get_org_subscription",  BILLING, ""),
    call("create_webhook_source", WEBHOOKS, "gen_random_uuid(), 'retell', 'isolation', 'v1.1.aaaa'"),
    call("rotate_webhook_source_secret", WEBHOOKS, "'{webhook_sources}', 'v1.1.aaaa'"),
    call("set_webhook_source_active", WEBHOOKS, "'{webhook_sources}', false"),
    call("list_unmapped_values",  WEBHOOKS, ""),
    call("complete_privacy_request", EDIT_STORES, "'{privacy_requests}'"),
    call("list_webhook_events",   WEBHOOKS, ""),
    after(AN_EVENT, call("get_webhook_event", WEBHOOKS, "'e0e0e0e0-0000-4000-8000-000000000001'")),
    call("redrive_webhook_events", WEBHOOKS, "null, '{\"status\": \"dead\"}'"),
    call("count_webhook_events",  WEBHOOKS, ""),
    after(A_QUIET_LINE, call("place_call", RUN, "'{campaigns}', '{leads}'")),
    after(A_FAILED_CALL, call("retry_call", RUN, "'{call_logs}'")),
    after(UNDER_WAY, call("hang_up_call", With(&["call.control"]), "'{call_logs}'")),
    after(UNDER_WAY, call("check_transfer", With(&["call.control"]), "'{call_logs}', '+919812345678'")),
    after(A_RECORDING, call("open_recording", With(&["call.listen"]), "'{call_logs}'")),
    call("erase_person",          With(&["lead.delete"]), "'+919999999999'"),
    call("get_invoice",           BILLING, "'{invoices}'"),
    call("get_credit_note",       BILLING, "'{credit_notes}'"),
    after(AN_ISSUER, call("preview_invoice", BILLING, "")),
    after(PLANS_TO_CHANGE, call("change_subscription", MANAGE_BILLING, "'isolation-other', null, 'period_end'")),
    after(PLANS_TO_CHANGE, call("preview_subscription_change", BILLING, "'isolation-other', null, 'period_end'")),
    after(PLANS_TO_CHANGE, call("cancel_subscription", MANAGE_BILLING, "")),
    after(PLANS_TO_CHANGE, call("pause_subscription",  MANAGE_BILLING, "")),
    after(PLANS_TO_CHANGE, call("redeem_coupon", MANAGE_BILLING, "'ISOLATION'")),
    after(PLANS_TO_CHANGE, call("resume_subscription", MANAGE_BILLING, "")),
    call("export_invoices",       BILLING, "'2026-01-01', '2026-12-31'"),
    call("export_invoice_lines",  BILLING, "'2026-01-01', '2026-12-31'"),
    call("export_payments",       BILLING, "'2026-01-01', '2026-12-31'"),
    call("export_gstr1",          BILLING, "'2026-01-01', '2026-12-31'"),
    after(OWED, call("request_payment_link", MANAGE_BILLING, "'{invoices}'")),
    after(OWED, call("collect_invoice", MANAGE_BILLING, "'{invoices}'")),
    after(OWED, call("request_mandate", MANAGE_BILLING, "")),
    after(OWED, call("forget_payment_method", MANAGE_BILLING, "'{payment_methods}'")),
    after(A_COUNTED_LINE, call("export_line_calls", BILLING, "'{invoices}', 1")),
];

/// What a member holds by default: the views and `lead.edit`. An admin holds all but `organization.manage`, an owner all.
pub const MEMBER: &[&str] = &[
    "lead.view",
    "lead.edit",
    "campaign.view",
    "call.view",
    "property.view",
    "store.view",
    "usage.view",
    "billing.view",
    "audit.view",
];

/// The line of a table.
pub fn of(table: &str) -> Option<&'static Wall> {
    WALLS.iter().find(|wall| wall.table == table)
}
