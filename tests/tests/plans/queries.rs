//! The hot queries: what screens, handlers and schedules ask all the time.

use tests::plans::{HotQuery, Who};

/// As PostgREST asks for a page.
macro_rules! page {
    ($query:literal) => {
        concat!(
            "with source as (",
            $query,
            ") select count(page), coalesce(json_agg(page), '[]') from (select * from source) as page"
        )
    };
}

const OWNER: Who = Who::User("owner1.1@example.com");
const OTHER_OWNER: Who = Who::User("owner2.1@example.com");
const ITS_CAMPAIGN: &str =
    "select set_config('trunkline.campaign', (select campaign.id::text from public.campaigns as campaign
  join public.profiles as owner using (organization_id) where owner.email = 'owner2.1@example.com'), true)";
const LARGE_CAMPAIGN: &str =
    "select set_config('trunkline.campaign', (select id::text from public.campaigns where name = 'Large'), true)";

/// Asked under row-level security.
const BY_USER: HotQuery = HotQuery {
    name: "",
    who: OWNER,
    before: "",
    sql: "",
    rows: 20,
    indexes: &[],
    each: 2,
    besides: 20,
    look_ups: Some(1),
    about: "",
};
/// Called by a handler.
const BY_HANDLER: HotQuery = HotQuery { who: Who::Service, rows: 1, look_ups: None, each: 60, besides: 100, ..BY_USER };

/// Makes twenty attempts, and leaves their ids for the statement.
macro_rules! released {
    () => {
        "select public.release_calls('{\"v\":1,\"limit\":20}');
         select set_config('trunkline.attempts', (select json_agg(id)::text from public.call_logs where status = 'created'), true);"
    };
}
/// Begins them too, and leaves one of them.
const BEGUN: &str = concat!(
    released!(),
    "select public.begin_dials(jsonb_build_object(
       'v', 1, 'lease_token', gen_random_uuid(), 'attempts', current_setting('trunkline.attempts')::jsonb));
     select set_config('trunkline.attempt', current_setting('trunkline.attempts')::jsonb ->> 0, true),
       set_config('trunkline.account', (select id::text from public.carrier_accounts), true);"
);

/// All of them.
pub const ALL: &[HotQuery] = &[
    HotQuery {
        name: "calls by time",
        sql: page!("select * from public.call_logs order by created_at desc limit 20"),
        indexes: &[&["idx_call_logs_organization_id"], &["profiles_pkey"]],
        ..BY_USER
    },
    HotQuery {
        name: "number of calls",
        sql: "select count(*) from public.call_logs",
        rows: 152,
        indexes: &[&[
            "idx_call_logs_organization_id",
            "idx_call_logs_campaign_id",
            "idx_call_logs_lead_id",
            "idx_call_logs_project_id",
            "call_logs_organization_id_id_key",
            "call_logs_organization_id_queue_id_attempt_no_key",
        ]],
        ..BY_USER
    },
    HotQuery {
        name: "calls of a campaign",
        who: OTHER_OWNER,
        before: ITS_CAMPAIGN,
        sql: page!(
            "select * from public.call_logs where campaign_id = current_setting('trunkline.campaign')::uuid order by created_at desc limit 20"
        ),
        indexes: &[&["idx_call_logs_campaign_id"]],
        ..BY_USER
    },
    HotQuery {
        name: "calls of a lead",
        before: "select set_config('trunkline.lead', (select lead_id::text from public.call_logs
                   where organization_id = (select organization_id from public.profiles where email = 'owner1.1@example.com') limit 1), true)",
        sql: page!("select * from public.call_logs where lead_id = current_setting('trunkline.lead')::uuid"),
        rows: 1,
        indexes: &[&["idx_call_logs_lead_id"]],
        ..BY_USER
    },
    HotQuery {
        name: "leads by time",
        sql: page!("select * from public.leads order by created_at desc limit 20"),
        indexes: &[&["idx_leads_created_at"]],
        ..BY_USER
    },
    HotQuery {
        name: "leads of a campaign",
        before: LARGE_CAMPAIGN,
        sql: page!(
            "select * from public.campaign_leads
             where campaign_id = current_setting('trunkline.campaign')::uuid order by lead_id limit 20"
        ),
        indexes: &[&["campaign_leads_organization_id_campaign_id_lead_id_key"]],
        each: 4,
        ..BY_USER
    },
    HotQuery {
        name: "messages of a conversation",
        before: "select set_config('trunkline.conversation', (select id::text from public.conversations
                   where organization_id = (select organization_id from public.profiles where email = 'owner1.1@example.com') limit 1), true)",
        sql: page!(
            "select * from public.conversation_messages
             where conversation_id = current_setting('trunkline.conversation')::uuid order by message_index"
        ),
        indexes: &[&["conversation_messages_organization_id_conversation_id_messa_key"]],
        ..BY_USER
    },
    HotQuery {
        name: "the organization's subscriptions",
        sql: page!("select * from public.subscriptions"),
        rows: 41,
        indexes: &[&["idx_subscriptions_org_id"]],
        ..BY_USER
    },
    HotQuery {
        name: "invoices by period",
        sql: page!("select * from public.invoices order by period_start desc, invoice_number desc limit 200"),
        rows: 59,
        // An organization has so few that they are read together and sorted.
        indexes: &[&["idx_invoices_org_period", "invoices_tenant_key", "idx_invoices_subscription"]],
        ..BY_USER
    },
    HotQuery {
        name: "usage of a period",
        sql: page!(
            "select * from public.usage_logs where period_start = (date_trunc('month', private.clock_now()) - interval '3 months')::date"
        ),
        rows: 6,
        indexes: &[&["idx_usage_logs_org_period"]],
        ..BY_USER
    },
    HotQuery {
        name: "get_usage",
        sql: "select count(public.get_usage())",
        rows: 1,
        indexes: &[&["idx_usage_logs_org_period"], &["idx_subscriptions_one_live"]],
        look_ups: Some(1),
        each: 25,
        besides: 50,
        ..BY_USER
    },
    HotQuery {
        name: "get_campaign",
        who: OTHER_OWNER,
        before: ITS_CAMPAIGN,
        sql: "select sum(number.value::integer) from jsonb_each_text(
                public.get_campaign(current_setting('trunkline.campaign')::uuid) -> 'counts') as number",
        rows: 50,
        each: 4,
        indexes: &[&["idx_campaign_leads_status"], &["idx_call_queue_due"]],
        ..BY_USER
    },
    HotQuery {
        name: "the poll: release_calls",
        sql: "select jsonb_array_length(public.release_calls('{\"v\":1,\"limit\":20}') -> 'attempts')",
        rows: 20,
        // It looks at more than twice as many as it takes, each against every gate (among them how often the person was called in a day, in
        // thirty and ever), and writes why it took those. What the rolled-back runs before it left of a queue row is passed over: how much that
        // is differs from run to run, by a hundred pages.
        each: 115,
        indexes: &[
            &["idx_call_queue_poll"],
            &["idx_call_queue_due"],
            &["idx_call_logs_faults", "idx_call_logs_ended"],
            &["idx_call_logs_live", "idx_call_logs_lease"],
            &["idx_call_logs_live_callee"],
            &["idx_call_logs_dialled"],
            &["call_queue_pkey"],
        ],
        ..BY_HANDLER
    },
    HotQuery {
        name: "begin_dials",
        before: released!(),
        sql: "select jsonb_array_length(public.begin_dials(jsonb_build_object(
                'v', 1, 'lease_token', gen_random_uuid(), 'attempts', current_setting('trunkline.attempts')::jsonb)) -> 'dials')",
        rows: 20,
        indexes: &[&["call_logs_pkey"]],
        ..BY_HANDLER
    },
    HotQuery {
        name: "reconcile_calls",
        before: concat!(released!(), "update public.call_logs set status = 'submitting', dialled = true, submitted_at = created_at, \
                         begun_at = now(), lease_until = now() - interval '1 minute' where status = 'created'"),
        sql: "select jsonb_array_length(public.reconcile_calls('{\"v\":1,\"limit\":10}') -> 'attempts')",
        rows: 10,
        indexes: &[&["idx_call_logs_live", "idx_call_logs_lease"]],
        ..BY_HANDLER
    },
    HotQuery {
        name: "apply_event: a hang-up",
        before: BEGUN,
        sql: "select (public.apply_event(jsonb_build_object(
                'v', 1, 'source', 'plivo', 'source_id', current_setting('trunkline.account'), 'kind', 'hangup', 'dedupe_key', 'new',
                'verified', true, 'attempt_id', current_setting('trunkline.attempt'),
                'call', jsonb_build_object('provider_call_id', 'x', 'status', 'ended', 'outcome', 'no_answer'))) ->> 'result' = 'applied')::integer",
        indexes: &[
            &["call_logs_pkey"],
            &["webhook_event_keys_pkey"],
            &["call_logs_organization_id_queue_id_attempt_no_key"],
            &["idx_call_logs_dialled"],
            &["campaign_leads_organization_id_campaign_id_lead_id_key", "idx_campaign_leads_lead"],
        ],
        ..BY_HANDLER
    },
    HotQuery {
        name: "apply_event: a duplicate",
        before: BEGUN,
        sql: "select (public.apply_event(jsonb_build_object(
                'v', 1, 'source', 'plivo', 'source_id', current_setting('trunkline.account'), 'kind', 'ring', 'dedupe_key', 'key7',
                'verified', true, 'attempt_id', current_setting('trunkline.attempt'), 'call', '{}')) ->> 'result' = 'duplicate')::integer",
        indexes: &[&["webhook_event_keys_pkey"]],
        ..BY_HANDLER
    },
    HotQuery {
        name: "sweep_events",
        sql: "select (public.sweep_events('{\"v\":1,\"limit\":20}') ->> 'applied')::integer",
        rows: 20,
        indexes: &[&["idx_webhook_events_failed"], &["call_logs_pkey"]],
        ..BY_HANDLER
    },
    HotQuery {
        name: "erase: what was told of a person",
        before: "select set_config('trunkline.organization',
                   (select organization_id::text from public.profiles where email = 'owner1.1@example.com'), true);
                 insert into private.webhook_events
                   (received_at, organization_id, source, source_id, dedupe_key, kind, body, payload_type, status)
                 select private.clock_now(), current_setting('trunkline.organization')::uuid, 'shopify', 'x', 'person' || n,
                   'orders/create', '{\"phone\": \"+91 98123-45678\"}', 'store', 'applied'
                 from generate_series(1, 20) as n",
        sql: "select (public.erase(jsonb_build_object('v', 1, 'organization_id', current_setting('trunkline.organization'),
                'phone', '+919812345678')) #>> '{rows,private.webhook_events}')::integer",
        rows: 20,
        indexes: &[&["idx_webhook_events_people"], &["webhook_events_pkey"]],
        about: "private.webhook_events",
        ..BY_HANDLER
    },
];
