//! What a freshly started stack is given so that somebody can use it, and how they are told: two organizations, a carrier account, and
//! lines to paste.

use crate::{
    carrier::{Account, Carrier, CarrierOptions},
    stack::{CarrierAccount, Organization, Stack},
};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fmt::Write;
use url::Url;

/// Names and owners of the organizations.
const ORGANIZATIONS: [(&str, &str); 2] =
    [("Acme Realty", "owner@acme.example.com"), ("Globex Stores", "owner@globex.example.com")];
/// A number for each to call from.
const CALLER_NUMBERS: [&str; 2] = ["+918031400001", "+918031400002"];
/// All that an organization's API key may be used for.
const SCOPES: [&str; 1] = ["usage.write"];

/// A carrier that somebody else runs.
#[derive(Debug, Clone)]
pub struct OtherCarrier {
    /// Root of its API.
    pub url: Url,
    /// The account there; a random one when none.
    pub auth_id: Option<String>,
    /// Its token; a random one when none.
    pub auth_token: Option<String>,
}

/// What was made for the stack's users.
pub struct Welcome {
    organizations: Vec<(Organization, String)>,
    account: CarrierAccount,
    carrier: Option<Carrier>,
}

impl Welcome {
    /// Signs two organizations up, starts the simulated carrier unless there is another one, and lets both call through it.
    pub async fn prepare(stack: &Stack, other: Option<OtherCarrier>) -> Result<Self> {
        let mut at_carrier = Account::fresh();
        let (carrier, url) = match other {
            Some(other) => {
                at_carrier.auth_id = other.auth_id.unwrap_or(at_carrier.auth_id);
                at_carrier.auth_token = other.auth_token.unwrap_or(at_carrier.auth_token);
                (None, other.url)
            }
            None => {
                let options = CarrierOptions {
                    accounts: vec![at_carrier.clone()],
                    log: Some(stack.log_dir.join("carrier.jsonl")),
                    ..CarrierOptions::default()
                };
                let carrier = Carrier::start(options).await?;
                let url = carrier.url().clone();
                (Some(carrier), url)
            }
        };
        let account = stack.create_carrier_account("plivo", &url, &at_carrier.auth_id, &at_carrier.auth_token).await?;
        let mut organizations = Vec::new();
        for ((name, email), number) in ORGANIZATIONS.into_iter().zip(CALLER_NUMBERS) {
            let organization = stack.sign_up(name, email).await?;
            stack.add_caller_number(organization.id, account.id, number).await?;
            let made = stack
                .call(&organization.owner.jwt, "create_api_key", &json!({ "name": "local", "scopes": SCOPES }))
                .await?;
            let key = made["key"].as_str().context("create_api_key returned no key")?.to_owned();
            organizations.push((organization, key));
        }
        Ok(Self { organizations, account, carrier })
    }

    /// Everything as one object.
    pub fn json(&self, stack: &Stack) -> Value {
        let organizations: Vec<Value> = self
            .organizations
            .iter()
            .map(|(organization, api_key)| {
                json!({
                    "organization_id": organization.id,
                    "user_id": organization.owner.id,
                    "user_jwt": organization.owner.jwt,
                    "email": organization.owner.email,
                    "api_key": api_key,
                })
            })
            .collect();
        json!({
            "origin": stack.origin_text(),
            "rest_url": stack.rest_url(),
            "functions_url": stack.functions_url(),
            "postgrest_url": trimmed(&stack.postgrest_url),
            "database_url": stack.database_url,
            "sqs_url": trimmed(&stack.sqs_url),
            "queue_urls": stack.queue_urls,
            "publishable_key": stack.keys.publishable_key,
            "secret_key": stack.keys.secret_key,
            "organizations": organizations,
            "carrier_account": {
                "carrier_account_id": self.account.id,
                "provider": self.account.provider,
                "auth_id": self.account.auth_id,
                "auth_token": self.account.auth_token,
                "api_url": trimmed(&self.account.api_url),
            },
            "business_time": stack.business_now(),
            "log_dir": stack.log_dir,
        })
    }

    /// Lines for a person to read and paste.
    pub fn text(&self, stack: &Stack) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _infallible = self.write(stack, &mut text);
        text
    }

    fn write(&self, stack: &Stack, text: &mut String) -> std::fmt::Result {
        let (organization, api_key) = &self.organizations[0];
        writeln!(text, "\nTrunkline is up. Ctrl-C stops it.\n")?;
        writeln!(text, "  API        {}", stack.origin_text())?;
        writeln!(text, "  database   {}", stack.database_url)?;
        writeln!(text, "  PostgREST  {}", stack.postgrest_url)?;
        writeln!(text, "  SQS        {}", stack.sqs_url)?;
        writeln!(text, "  carrier    {} (account {})", self.account.api_url, self.account.auth_id)?;
        writeln!(text, "  logs       {}", stack.log_dir.display())?;
        writeln!(text, "  time       {} in Kolkata", kolkata(stack.business_now()))?;
        writeln!(text, "\nFor a shell, as the owner of {}:\n", ORGANIZATIONS[0].0)?;
        writeln!(text, "export API={} KEY={}", stack.origin_text(), stack.keys.publishable_key)?;
        writeln!(text, "export JWT={}", organization.owner.jwt)?;
        writeln!(text, "export API_KEY={api_key}")?;
        writeln!(
            text,
            "trunkline() {{ curl -sS -H \"apikey: $KEY\" -H \"Authorization: Bearer $JWT\" -H 'content-type: application/json' -H 'prefer: return=representation' \"$@\"; echo; }}"
        )?;
        writeln!(text, "\n# a lead, a campaign over all leads, its start, and what became of it")?;
        writeln!(text, "trunkline $API/rest/v1/leads -d '{{\"name\":\"Asha\",\"phone\":\"+919876543210\"}}'")?;
        writeln!(
            text,
            "CAMPAIGN=$(trunkline $API/functions/v1/call-dispatch/campaigns -d '{{\"name\":\"First\"}}' | sed -E 's/.*\"id\" ?: ?\"([0-9a-f-]{{36}})\".*/\\1/')"
        )?;
        writeln!(text, "trunkline -X POST $API/functions/v1/call-dispatch/campaigns/$CAMPAIGN/start")?;
        writeln!(text, "trunkline $API/functions/v1/call-dispatch/campaigns/$CAMPAIGN")?;
        writeln!(text, "trunkline \"$API/rest/v1/call_logs?select=callee_number,status,call_status,duration\"")?;
        writeln!(text, "\n# what was used, and what is billed")?;
        writeln!(text, "trunkline $API/functions/v1/usage-metering/usage")?;
        writeln!(text, "trunkline $API/functions/v1/invoice-generation/invoices")?;
        writeln!(text, "\n# the tables")?;
        write!(text, "psql '{}'", stack.database_url)
    }

    /// Stops the simulated carrier.
    pub async fn stop(self) {
        if let Some(carrier) = self.carrier {
            carrier.stop().await;
        }
    }
}

fn trimmed(url: &Url) -> &str {
    url.as_str().trim_end_matches('/')
}

fn kolkata(at: chrono::DateTime<chrono::Utc>) -> String {
    match chrono::FixedOffset::east_opt(5 * 3600 + 1800) {
        Some(zone) => at.with_timezone(&zone).format("%A %Y-%m-%d %H:%M").to_string(),
        None => at.to_rfc3339(),
    }
}
