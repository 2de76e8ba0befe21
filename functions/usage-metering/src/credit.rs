//! What a month grants of prepaid credit, and what has expired.

use crate::Metering;
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{Result, trigger::Invocation};

/// Wallets looked at by one request.
const BATCH: u32 = 500;

#[derive(Deserialize)]
struct Renewed {
    granted: u64,
    expired: u64,
    more: bool,
}

/// Takes out of the wallets what has expired and grants what a month brings, each once, until nothing is left to do.
pub async fn renew(metering: &Metering, invocation: &Invocation) -> Result<Value> {
    let request = json!({ "v": 1, "limit": BATCH });
    let (mut granted, mut expired) = (0, 0);
    loop {
        let renewed: Renewed = metering.supabase.call_until("renew_credit", &request, invocation.wait_until()).await?;
        granted += renewed.granted;
        expired += renewed.expired;
        if !renewed.more {
            break;
        }
    }
    tracing::info!(granted, expired, "prepaid credit renewed");
    Ok(json!({ "granted": granted, "expired": expired }))
}
