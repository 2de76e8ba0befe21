//! What the database wants of a gateway, and what is said of it afterwards.

use super::wire::{Reply, Silence};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Have the holder told of a debit.
    Notify,
    /// Send the request.
    Submit,
    /// Ask what became of it.
    LookUp,
    /// Take a link back.
    Cancel,
}

/// What the request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A saved method is charged.
    Charge,
    /// A page on which an invoice is paid.
    Link,
    /// Money goes back.
    Refund,
    /// A page on which a method is saved.
    Setup,
    /// A saved method is forgotten.
    Revoke,
}

/// The account, its keys sealed for its id.
#[derive(Debug, Clone, Deserialize)]
pub struct SealedAccount {
    pub id: Uuid,
    pub credentials_sealed: String,
    pub api_base: String,
    pub return_url: Option<String>,
}

/// One request.
#[derive(Debug, Clone, Deserialize)]
pub struct Ask {
    pub id: Uuid,
    #[serde(rename = "do")]
    pub action: Action,
    pub kind: Kind,
    pub gateway: String,
    pub account: SealedAccount,
    pub submission: i32,
    pub organization_id: Uuid,
    pub invoice_id: Option<Uuid>,
    pub invoice_number: Option<String>,
    pub amount_minor: Option<i64>,
    pub currency: Option<String>,
    pub method: Option<String>,
    pub customer_id: Option<String>,
    pub token: Option<String>,
    pub reference: Option<String>,
    pub order_ref: Option<String>,
    /// The gateway's id of the payment that goes back.
    pub refund_of: Option<String>,
    /// Orders of earlier charges of the same invoice, the newest first.
    pub earlier_orders: Vec<String>,
    /// Unix second of the debit.
    pub debit_at: i64,
    /// Before this second it was not asked for.
    pub since: i64,
    pub expires_at: i64,
    pub name: Option<String>,
    pub contact: Option<String>,
    pub email: Option<String>,
    pub mandate_limit: Option<i64>,
}

impl Ask {
    /// The key by which the gateway knows the request again.
    pub fn key(&self) -> String {
        self.id.to_string()
    }

    /// The same in at most 40 letters.
    pub fn receipt(&self) -> String {
        self.id.simple().to_string()
    }

    /// What the payer reads.
    pub fn description(&self) -> String {
        format!("Invoice {}", self.invoice_number.as_deref().unwrap_or_default())
    }

    /// The amount; nothing is asked for where there is none.
    pub fn amount(&self) -> i64 {
        self.amount_minor.unwrap_or_default()
    }

    /// The currency, in capitals.
    pub fn currency(&self) -> &str {
        self.currency.as_deref().unwrap_or_default()
    }
}

/// What came of it.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub struct Outcome {
    pub outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order_ref: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payment_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub amount_minor: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub currency: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub customer_id: Option<String>,
}

impl Outcome {
    /// One of which there is nothing more to say.
    pub fn of(outcome: &'static str) -> Self {
        Self { outcome, ..Self::default() }
    }

    /// With a code.
    pub fn coded(outcome: &'static str, code: impl Into<String>) -> Self {
        Self { outcome, code: Some(code.into()), ..Self::default() }
    }

    /// Of what a silence proves: not sent is not done, anything else may be.
    pub fn of_silence(silence: Silence) -> Self {
        match silence {
            Silence::NotSent => Self::coded("deferred", "connect"),
            Silence::Unknown(code) => Self::coded("unknown", code),
        }
    }

    /// Of what a status proves by itself, with the gateway's code for it. A key that the gateway does not know is ours to mend: nothing
    /// was done, and the request waits for it.
    pub fn of_status(reply: &Reply, code: Option<&str>) -> Self {
        let code = code.map_or_else(|| reply.status.as_u16().to_string(), str::to_owned);
        match reply.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                tracing::error!(code, "the payment gateway refuses our key");
                Self::coded("deferred", code)
            }
            StatusCode::TOO_MANY_REQUESTS => Self::coded("deferred", code),
            StatusCode::CONFLICT | StatusCode::REQUEST_TIMEOUT => Self::coded("unknown", code),
            status if status.is_client_error() => Self::coded("refused", code),
            _ => Self::coded("unknown", code),
        }
    }

    /// Of a look-up that failed: it says nothing of what was looked for.
    pub fn not_looked_up(result: std::result::Result<Reply, Silence>) -> Self {
        match result {
            Ok(reply) if reply.status == StatusCode::TOO_MANY_REQUESTS => Self::coded("deferred", "429"),
            Ok(reply) => Self::coded("unknown", reply.status.as_u16().to_string()),
            Err(_) => Self::coded("unknown", "away"),
        }
    }
}

/// A text of an answer.
pub fn text(value: &Value) -> Option<String> {
    value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)
}
