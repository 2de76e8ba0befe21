//! Supabase Storage, as the service: objects streamed in, links that end soon, objects gone.

use crate::{Error, Result, config::Config, secrets::SecretStore};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::time::Duration;
use url::Url;

/// How long a request may take that carries no object.
const SHORT: Duration = Duration::from_secs(8);

/// A client of one project's Storage.
#[derive(Clone)]
pub struct Storage {
    http: reqwest::Client,
    root: String,
    secrets: SecretStore,
}

/// An object that is there, as an event or a message names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Its place in the bucket.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// Its media type.
    pub content_type: String,
}

/// An object to put.
pub struct Object {
    /// Its media type.
    pub content_type: String,
    /// Its length where it is known.
    pub length: Option<u64>,
    /// Its bytes.
    pub body: reqwest::Body,
}

impl Storage {
    /// A client for the project that `config` names, sending through `http`.
    pub fn new(config: &Config, http: reqwest::Client, secrets: SecretStore) -> Self {
        let root = format!("{}/storage/v1", config.supabase_url.as_str().trim_end_matches('/'));
        Self { http, root, secrets }
    }

    /// Puts an object in its place, over one that is there already. It is there whole or not at all.
    pub async fn upload(&self, bucket: &str, path: &str, object: Object, limit: Duration) -> Result<()> {
        let mut request = self
            .service(self.http.post(self.url("object", bucket, path)?))
            .await?
            .header("x-upsert", "true")
            .header("cache-control", "no-store")
            .header(http::header::CONTENT_TYPE, object.content_type)
            .timeout(limit)
            .body(object.body);
        if let Some(length) = object.length {
            request = request.header(http::header::CONTENT_LENGTH, length);
        }
        answered(request.send().await).await.map(drop)
    }

    /// A link to an object that anybody may follow for so many seconds. Error 404 where there is no such object.
    pub async fn sign(&self, bucket: &str, path: &str, seconds: u32) -> Result<Url> {
        #[derive(Deserialize)]
        struct Signed {
            #[serde(rename = "signedURL")]
            signed_url: String,
        }
        let request = self.service(self.http.post(self.url("object/sign", bucket, path)?)).await?.timeout(SHORT);
        let body = answered(request.json(&json!({ "expiresIn": seconds })).send().await).await?;
        let signed: Signed = serde_json::from_slice(&body)?;
        Url::parse(&format!("{}/{}", self.root, signed.signed_url.trim_start_matches('/')))
            .map_err(|error| Error::internal(format!("Storage signed no URL: {error}")))
    }

    /// Deletes objects. One that is not there is gone already.
    pub async fn delete(&self, bucket: &str, paths: &[String]) -> Result<()> {
        let url = format!("{}/object/{bucket}", self.root);
        let request = self.service(self.http.delete(url)).await?.timeout(SHORT);
        answered(request.json(&json!({ "prefixes": paths })).send().await).await.map(drop)
    }

    fn url(&self, action: &str, bucket: &str, path: &str) -> Result<Url> {
        let mut url = Url::parse(&format!("{}/{action}", self.root))
            .map_err(|error| Error::internal(format!("the project's URL is none: {error}")))?;
        let named = path.split('/').all(|segment| !matches!(segment, "" | "." | ".."));
        match url.path_segments_mut() {
            Ok(mut segments) if named => segments.push(bucket).extend(path.split('/')),
            _ => return Err(Error::internal("an object's path is none")),
        };
        Ok(url)
    }

    async fn service(&self, request: reqwest::RequestBuilder) -> Result<reqwest::RequestBuilder> {
        Ok(request.header("apikey", &self.secrets.get().await?.supabase_secret_key))
    }
}

async fn answered(sent: reqwest::Result<reqwest::Response>) -> Result<bytes::Bytes> {
    let away = |error: reqwest::Error| Error::unavailable(format!("Storage does not answer: {}", error.without_url()));
    let answer = sent.map_err(away)?;
    let status = answer.status();
    let body = answer.bytes().await.map_err(away)?;
    if status.is_success() { Ok(body) } else { Err(refusal(status, &body)) }
}

/// Storage answers most refusals with 400 and says in the body what they are.
fn refusal(status: StatusCode, body: &[u8]) -> Error {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Wire {
        #[serde(rename = "statusCode")]
        status_code: Option<serde_json::Value>,
        error: String,
    }
    let wire: Wire = serde_json::from_slice(body).unwrap_or_default();
    let told =
        wire.status_code.and_then(|code| code.as_str().map(str::to_owned).unwrap_or(code.to_string()).parse().ok());
    match told.unwrap_or(status.as_u16()) {
        404 => Error::not_found("there is no such object"),
        413 => Error::new(StatusCode::PAYLOAD_TOO_LARGE, "object_too_large", "Storage takes no object of this size"),
        429 | 500.. => Error::unavailable(format!("Storage answered {status}")),
        _ => Error::internal(format!("Storage answered {status} {}", wire.error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secrets::Secrets;

    fn storage() -> Storage {
        let secrets = Secrets {
            supabase_secret_key: "sb_secret_x".to_owned(),
            callback_keys: vec![],
            seal_keys: vec![],
            nudge_keys: vec![],
        };
        Storage {
            http: crate::supabase::http_client().unwrap(),
            root: "https://p.supabase.co/storage/v1".to_owned(),
            secrets: SecretStore::fixed(secrets),
        }
    }

    #[test]
    fn a_path_stays_below_its_bucket() {
        let storage = storage();
        let url = storage.url("object", "recordings", "o/a b.mp3").unwrap();
        assert_eq!(url.as_str(), "https://p.supabase.co/storage/v1/object/recordings/o/a%20b.mp3");
        for path in ["../other/x", "o//x", "", "o/./x"] {
            assert!(storage.url("object", "recordings", path).is_err(), "{path}");
        }
    }

    #[test]
    fn what_the_body_says_counts_more_than_the_status() {
        let missing = br#"{"statusCode":"404","error":"not_found","message":"Object not found"}"#;
        assert_eq!(refusal(StatusCode::BAD_REQUEST, missing).status, StatusCode::NOT_FOUND);
        assert_eq!(refusal(StatusCode::BAD_REQUEST, br#"{"statusCode":413}"#).code, "object_too_large");
        assert!(refusal(StatusCode::BAD_GATEWAY, b"<html>").is_retryable());
        assert!(!refusal(StatusCode::FORBIDDEN, b"").message.contains("http"));
    }
}
