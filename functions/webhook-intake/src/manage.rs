//! `POST sources` and `POST sources/{id}/secrets`: an organization's own sources. The secret is sealed here and the row is made under the
//! user's JWT, so that the database decides who may.

use crate::{
    Intake,
    sources::{self, Source},
};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
    seal::Sealer,
};
use uuid::Uuid;

/// How long a secret may be: no provider's is longer.
const LONGEST_SECRET: usize = 2048;

#[derive(Deserialize)]
struct Create {
    provider: String,
    name: Option<String>,
    secret: Option<String>,
    #[serde(default = "no_settings")]
    settings: Value,
    store_id: Option<Uuid>,
}

fn no_settings() -> Value {
    json!({})
}

#[derive(Deserialize)]
struct Rotate {
    secret: Option<String>,
    keep_previous_seconds: Option<i32>,
}

/// Makes a source. 201 with the URL to give to the provider, and with the secret where we chose it: it is shown this once.
pub async fn create(intake: &Intake, request: &Request) -> Result<Response> {
    let jwt = request.user_jwt()?;
    let asked: Create = request.json().map_err(unreadable)?;
    let source = sources::find(&asked.provider).ok_or_else(|| {
        Error::new(StatusCode::UNPROCESSABLE_ENTITY, "unknown_provider", "there is no such provider").at("provider")
    })?;
    source.check_settings(&asked.settings)?;
    let (secret, chosen) = secret_of(source, asked.secret)?;
    let id = Uuid::new_v4();
    let arguments = json!({
        "id": id,
        "provider": source.name(),
        "name": asked.name.unwrap_or_else(|| source.name().to_owned()),
        "secret_sealed": seal(intake, &secret, id).await?,
        "settings": asked.settings,
        "store_id": asked.store_id,
    });
    let made: Value = intake.supabase.call_as(jwt, "create_webhook_source", &arguments).await?;
    web::json_with(StatusCode::CREATED, &shown(intake, source, id, made, chosen.then_some(secret)))
}

/// Gives a source a new secret. 200 with the secret where we chose it.
pub async fn rotate(intake: &Intake, id: &str, request: &Request) -> Result<Response> {
    let jwt = request.user_jwt()?;
    let id: Uuid = id.parse().map_err(|_| Error::not_found("there is no such source").at("source_id"))?;
    let asked: Rotate = request.json().map_err(unreadable)?;
    let query = intake.supabase.from("webhook_sources").select("provider").eq("id", id.to_string());
    let known: Vec<Value> = intake.supabase.query_as(jwt, query).await?;
    let source = known
        .first()
        .and_then(|row| sources::find(row["provider"].as_str()?))
        .ok_or_else(|| Error::not_found("there is no such source").at("source_id"))?;
    let (secret, chosen) = secret_of(source, asked.secret)?;
    let arguments = json!({
        "source_id": id,
        "secret_sealed": seal(intake, &secret, id).await?,
        "keep_previous_seconds": asked.keep_previous_seconds.unwrap_or(86_400),
    });
    let made: Value = intake.supabase.call_as(jwt, "rotate_webhook_source_secret", &arguments).await?;
    web::json(&shown(intake, source, id, made, chosen.then_some(secret)))
}

/// A body that cannot be read may hold a secret, which what serde says would quote.
fn unreadable(_: Error) -> Error {
    Error::malformed("body", "the body is an object of provider, name, secret, settings and store_id")
}

/// The secret of a source, and whether it is one that we chose.
fn secret_of(source: &dyn Source, given: Option<String>) -> Result<(String, bool)> {
    let invalid =
        |message: &str| Error::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_secret", message.to_owned()).at("secret");
    match given {
        Some(secret) if secret.is_empty() || secret.len() > LONGEST_SECRET => {
            Err(invalid("the secret is empty or too long"))
        }
        Some(secret) => source.check_secret(&secret).map(|()| (secret, false)),
        None => {
            let secret = source.new_secret().ok_or_else(|| invalid("this provider chooses the secret: enter it"))?;
            Ok((secret, true))
        }
    }
}

async fn seal(intake: &Intake, secret: &str, id: Uuid) -> Result<String> {
    Sealer::new(&intake.secrets.get().await?.seal_keys)?.seal(secret, &id.to_string())
}

fn shown(intake: &Intake, source: &dyn Source, id: Uuid, mut row: Value, secret: Option<String>) -> Value {
    let origin = &intake.config.public_origin;
    row["url"] = json!(format!("{origin}/functions/v1/webhook-intake/{}/{id}", source.name()));
    if let Some(secret) = secret {
        row["secret"] = json!(secret);
    }
    row
}
