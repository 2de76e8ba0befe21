//! What users and operators do before the point where a test begins: each step as it is done in earnest.

use crate::{
    Stack,
    carrier::{CarrierStub, Create},
    events::{self, HttpEvent},
};
use anyhow::{Context, Result, ensure};
use call_dispatch::Dispatch;
use local::{
    parts::postgres::Role,
    stack::{User, create_user},
};
use serde_json::{Value, json};
use shared::seal::Sealer;
use uuid::Uuid;

/// A Tuesday, at ten in the morning in Kolkata: everybody may be called.
pub const TUESDAY_TEN: &str = "2026-11-24T10:00:00+05:30";

/// An organization and the user who signed it up.
#[derive(Debug, Clone)]
pub struct Tenant {
    /// Its id.
    pub id: Uuid,
    /// Its owner, signed in.
    pub owner: User,
}

impl Tenant {
    /// The owner's token.
    pub fn jwt(&self) -> &str {
        &self.owner.jwt
    }
}

/// Signs an organization up: a user at Supabase Auth, then `create_organization` under the user's token.
pub async fn sign_up(stack: &Stack, name: &str) -> Result<Tenant> {
    let auth = stack.database.connect(Role::AuthAdmin).await?;
    let email = format!("{}@example.com", Uuid::new_v4().simple());
    let owner = create_user(&auth, &stack.keys, &email, name).await?;
    let made = stack.rpc(&owner.jwt, "create_organization", &json!({ "name": name })).await?;
    let id = made["organization_id"].as_str().context("no organization_id")?.parse()?;
    Ok(Tenant { id, owner })
}

/// What an operator does so that a tenant can dial: an account at the carrier, sealed for its row, and a number to call from. No limit
/// on calls at once but the campaign's.
pub async fn connect_carrier(stack: &Stack, tenant: &Tenant, carrier: &CarrierStub) -> Result<Uuid> {
    let account = Uuid::new_v4();
    let sealed = Sealer::new(&stack.keys.secrets()?.seal_keys)?.seal(&carrier.auth_token, &account.to_string())?;
    let base = carrier.url.as_str().trim_end_matches('/');
    stack
        .sql
        .execute(
            "insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base, max_concurrent_calls) \
             values ($1, 'plivo', $2, $3, $4, 1000)",
            &[&account, &carrier.auth_id, &sealed, &base],
        )
        .await?;
    let number = format!("+9180{:08}", account.as_u128() % 100_000_000);
    stack
        .sql
        .execute(
            "insert into public.caller_numbers (organization_id, carrier_account_id, phone_number) values ($1, $2, $3)",
            &[&tenant.id, &account, &number],
        )
        .await?;
    stack
        .sql
        .execute("update public.organizations set max_concurrent_calls = 1000 where id = $1", &[&tenant.id])
        .await?;
    Ok(account)
}

/// What an operator does when a tenant buys a plan: this one costs 999 rupees a month, includes `included_seconds` of calling, and 6
/// rupees a minute beyond. It begins at once, and its period ends a month later.
pub async fn buy_plan(stack: &Stack, tenant: &Tenant, included_seconds: i64) -> Result<()> {
    let slug = format!("plan-{}", tenant.id.simple());
    stack
        .sql
        .execute(
            "with plan as (
               insert into public.subscription_plans (slug, name, is_public) values ($1, 'Talk', false) returning id
             ), price as (
               insert into public.plan_prices (plan_id, version, billing_cycle, currency, base_minor)
               select id, 1, 'monthly', 'INR', 99900 from plan returning id
             )
             insert into public.plan_price_meters (plan_price_id, meter_key, included_units, overage_price_minor, overage_unit)
             select price.id, term.meter_key, term.included, term.price, term.unit
             from price, (values ('ai_calls', -1::bigint, null::bigint, 1::bigint), ('call_seconds', $2, 600, 60), ('sms_messages', 5, 25, 1))
               as term (meter_key, included, price, unit)",
            &[&slug, &included_seconds],
        )
        .await
        .context("the plan")?;
    stack
        .sql
        .query_one("select private.subscribe_organization($1, $2, 'active', private.clock_now())", &[&tenant.id, &slug])
        .await
        .context("the subscription")?;
    Ok(())
}

/// An API key of the tenant's own systems, made by its owner; the key itself.
pub async fn create_api_key(stack: &Stack, tenant: &Tenant) -> Result<String> {
    let made = stack.rpc(tenant.jwt(), "create_api_key", &json!({ "name": "CRM", "scopes": ["usage.write"] })).await?;
    Ok(made["key"].as_str().context("a key without a key")?.to_owned())
}

/// The phone numbers of a tenant's leads, `from` on: +91980000NNNN.
pub fn phones(from: u32, count: u32) -> Vec<String> {
    (from..from + count).map(|number| format!("+91980{number:07}")).collect()
}

/// Puts leads in through `/rest/v1`, as an import of the owner's does.
pub async fn import_leads(stack: &Stack, tenant: &Tenant, phones: &[String]) -> Result<Vec<Uuid>> {
    let leads: Vec<Value> = phones
        .iter()
        .map(|phone| json!({ "name": format!("Lead {phone}"), "phone": phone, "recording_consent": true }))
        .collect();
    let (status, made) = stack.rest(tenant.jwt(), "POST", "leads?select=id", Some(&json!(leads))).await?;
    ensure!(status.is_success(), "leads: {status} {made}");
    let ids = made.as_array().context("leads are a list")?;
    ids.iter().map(|lead| Ok(lead["id"].as_str().context("a lead without an id")?.parse()?)).collect()
}

/// Creates a campaign of all leads by `POST campaigns`.
pub async fn create_campaign(dispatch: &Dispatch, tenant: &Tenant, settings: Value) -> Result<Uuid> {
    let request = HttpEvent::post("/functions/v1/call-dispatch/campaigns").bearer(tenant.jwt());
    let answer = request.json(&json!({ "name": "Autumn", "settings": settings }))?.send(dispatch).await?;
    ensure!(answer.status == 201, "POST campaigns: {} {}", answer.status, answer.body);
    Ok(answer.json()["id"].as_str().context("a campaign without an id")?.parse()?)
}

/// `POST campaigns/{id}/{action}`.
pub fn campaign_action(tenant: &Tenant, campaign: Uuid, action: &str) -> HttpEvent {
    HttpEvent::post(&format!("/functions/v1/call-dispatch/campaigns/{campaign}/{action}")).bearer(tenant.jwt())
}

/// A running campaign of one tenant with these phone numbers, recorded, nothing released yet.
pub struct Campaign {
    /// The tenant.
    pub tenant: Tenant,
    /// The campaign.
    pub id: Uuid,
    /// The carrier account that it dials through.
    pub account: Uuid,
    /// The carrier.
    pub carrier: CarrierStub,
    /// The dispatcher.
    pub dispatch: Dispatch,
}

/// Plays everything up to a started campaign, at ten o'clock on a Tuesday.
pub async fn running_campaign(stack: &Stack, phones: &[String]) -> Result<Campaign> {
    stack.set_clock(TUESDAY_TEN).await?;
    let tenant = sign_up(stack, "Acme Homes").await?;
    let carrier = CarrierStub::start().await?;
    let account = connect_carrier(stack, &tenant, &carrier).await?;
    import_leads(stack, &tenant, phones).await?;
    let dispatch = stack.dispatch()?;
    let id = create_campaign(&dispatch, &tenant, json!({ "max_concurrent_calls": 1000, "record_calls": true })).await?;
    let started = campaign_action(&tenant, id, "start").send(&dispatch).await?;
    ensure!(started.status == 200, "start: {} {}", started.status, started.body);
    Ok(Campaign { tenant, id, account, carrier, dispatch })
}

impl Campaign {
    /// Releases what is due and dials it; the carrier's calls of this round.
    pub async fn dial(&self, stack: &Stack) -> Result<Vec<Create>> {
        let before = self.carrier.creates().len();
        events::job(&self.dispatch, "release").await?;
        let delivered = stack.dial_queue.deliver(&self.dispatch).await?;
        ensure!(delivered.failed == 0, "{delivered:?}");
        Ok(self.carrier.creates().split_off(before))
    }
}
