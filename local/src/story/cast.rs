//! Who plays: an organization that signs up, the plan it buys, the carrier account it calls through, its leads and its campaign.
//!
//! What a user does goes through the API with that user's token. What the operator does (a plan, a carrier account, a caller number,
//! limits) is SQL, as it is in production.

use super::{browser::Browser, leads};
use crate::{
    parts::{postgres::Role, progress::Step},
    stack::{Organization, Stack},
};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use url::Url;
use uuid::Uuid;

/// The demo's own plan.
pub const PLAN: &str = "demo";
/// The number that the organization calls from.
const CALLER: &str = "+918047112233";
/// Leads a request.
const LEADS_PER_REQUEST: usize = 2_500;

/// An organization that is ready to call.
pub struct Cast {
    /// It and its owner.
    pub organization: Organization,
    /// The owner's session.
    pub browser: Browser,
}

/// Signs the organization up, and lets the operator give it what it needs. `live_calls` bounds calls at the same time.
pub async fn sign_up(
    stack: &Stack,
    provider: &str,
    carrier: &Url,
    credentials: (&str, &str),
    live_calls: i32,
) -> Result<Cast> {
    let organization = stack.sign_up("Sunrise Realty", "asha@sunrise-realty.example").await?;
    let http = crate::parts::http_client()?;
    let browser = Browser::new(http, stack.origin.clone(), &stack.keys.publishable_key, &organization.owner.jwt);
    let particulars = json!({
        "company_name": "Sunrise Realty Private Limited", "address_line_1": "14 Residency Road", "city": "Bengaluru",
        "state": "Karnataka", "state_code": "KA", "pincode": "560025",
    });
    browser.patch(&format!("rest/v1/organizations?id=eq.{}", organization.id), &particulars).await?;

    let account = stack.create_carrier_account(provider, carrier, credentials.0, credentials.1).await?;
    stack.add_caller_number(organization.id, account.id, CALLER).await?;
    operator(stack, organization.id, account.id, live_calls).await?;
    Ok(Cast { organization, browser })
}

/// The operator's part: the demo's plan, the subscription to it, and how many calls there may be at once.
async fn operator(stack: &Stack, organization: Uuid, account: Uuid, live_calls: i32) -> Result<()> {
    let database = stack.connect(Role::Owner).await?;
    database
        .batch_execute(
            "with plan as ( \
               insert into public.subscription_plans (slug, name, description, is_public) \
               values ('demo', 'Demo', 'An hour of calling a month, the rest by the minute', false) returning id \
             ), \
             price as ( \
               insert into public.plan_prices (plan_id, version, billing_cycle, currency, base_minor) \
               select id, 1, 'monthly', 'INR', 99900 from plan returning id \
             ) \
             insert into public.plan_price_meters (plan_price_id, meter_key, included_units, overage_price_minor, overage_unit) \
             select price.id, term.meter_key, term.included_units, term.overage_price_minor, term.overage_unit \
             from price, (values ('ai_calls', -1::bigint, null::bigint, 1::bigint), ('call_seconds', 3600, 600, 60)) \
               as term (meter_key, included_units, overage_price_minor, overage_unit)",
        )
        .await
        .context("cannot make the demo's plan")?;
    database
        .query_one(
            "select private.subscribe_organization($1, $2, 'active', private.clock_now())",
            &[&organization, &PLAN],
        )
        .await
        .context("cannot subscribe to the demo's plan")?;
    for (table, id) in [("organizations", organization), ("carrier_accounts", account)] {
        database
            .execute(&format!("update public.{table} set max_concurrent_calls = $2 where id = $1"), &[&id, &live_calls])
            .await
            .context("cannot set how many calls there may be at once")?;
    }
    Ok(())
}

/// Makes the project and imports `count` leads into it; the project's id.
pub async fn import_leads(cast: &Cast, count: usize, step: &Step) -> Result<Uuid> {
    let project =
        cast.browser.insert("projects", &json!({ "name": "Sunrise Heights", "project_type": "residential" })).await?;
    let project = id_of(&project)?;
    step.set_length(count as u64);
    let mut imported = 0;
    for sheet in leads::sheets(count, LEADS_PER_REQUEST, project)? {
        cast.browser.import("leads", sheet.csv).await?;
        imported += sheet.rows;
        step.set_position(imported as u64);
    }
    Ok(project)
}

/// Makes the campaign over the project's leads; its id.
pub async fn plan_campaign(cast: &Cast, project: Uuid, live_calls: i32) -> Result<Uuid> {
    let campaign = json!({
        "name": "Site visits, November",
        "project_id": project,
        "settings": {
            "timezone": "Asia/Kolkata", "time_start": "09:00", "time_end": "21:00", "max_concurrent_calls": live_calls,
            "max_attempts": 3, "record_calls": true,
        },
    });
    id_of(&cast.browser.post("functions/v1/call-dispatch/campaigns", &campaign).await?)
}

/// Starts the campaign.
pub async fn start_campaign(cast: &Cast, campaign: Uuid) -> Result<Value> {
    cast.browser.post(&format!("functions/v1/call-dispatch/campaigns/{campaign}/start"), &json!({})).await
}

fn id_of(row: &Value) -> Result<Uuid> {
    let id = row["id"].as_str().with_context(|| format!("there is no id in {row}"))?;
    Ok(id.parse()?)
}
